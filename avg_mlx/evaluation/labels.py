"""Where the names of points stand in a picture, so that none covers another: geometry only, and always the same."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

GAP = 4.0  # between a label and whatever is beside it
MARGIN = np.array([GAP, GAP / 2])
RINGS = [1.3**n for n in range(22)]  # distances of labels from their points: 1 to 247
DIRECTIONS = [math.pi * n / 8 for n in range(-8, 8)]
# What makes a place bad, in units of distance: to cover a label or a point, a leader across one, to cover a line, and
# another point about as near as the label's own.
COVERED, CROSSED, TOUCHED, AMBIGUOUS = 1e6, 1e3, 8.0, 16.0


class Point(NamedTuple):
    """A place in the picture, x to the right and y upwards."""

    x: float
    y: float


class Box(NamedTuple):
    """A rectangle with its sides parallel to the axes."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, middle: Point, width: float, height: float) -> "Box":
        """The box of that size around `middle`."""
        return cls(middle.x - width / 2, middle.y - height / 2, middle.x + width / 2, middle.y + height / 2)

    @property
    def middle(self) -> Point:
        """The point in the middle."""
        return Point((self.left + self.right) / 2, (self.bottom + self.top) / 2)

    def nearest(self, point: Point) -> Point:
        """The place in the box that is nearest to a point."""
        return Point(min(max(point.x, self.left), self.right), min(max(point.y, self.bottom), self.top))


def along(start: Point, end: Point) -> list[Point]:
    """Points that stand for a line: at most GAP apart."""
    steps = max(1, math.ceil(math.dist(start, end) / GAP))
    return [Point(*(a + (b - a) * n / steps for a, b in zip(start, end, strict=True))) for n in range(steps + 1)]


def place(
    points: Sequence[Point], sizes: Sequence[tuple[float, float]], marker: float, lines: Sequence[Point], area: Box
) -> list[Box]:
    """A box in `area` for the label of each point, near the point; `sizes` are (width, height).

    As long as there is room, boxes overlap neither each other nor the points' markers, which are `marker` wide and
    high. Points along `lines` are covered only where every other place is much farther away.
    """
    obstacles = list(lines)
    boxes: dict[int, Box] = {}
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        surroundings = _Surroundings(
            i, np.array(points), marker, np.array([*boxes.values()]), np.array(obstacles), area
        )
        best, lowest = area, math.inf
        for distance, box in _candidates(points[i], marker, *sizes[i]):
            if distance > lowest:
                break
            if (cost := surroundings.cost(box)) < lowest:
                best, lowest = box, cost
        boxes[i] = best
        obstacles += along(points[i], best.nearest(points[i]))
    return [boxes[i] for i in range(len(points))]


def _candidates(point: Point, marker: float, width: float, height: float) -> Iterator[tuple[float, Box]]:
    """Boxes around a point's marker with their distances, nearer ones first."""
    for distance in RINGS:
        reach = marker / 2 + GAP + distance
        for angle in DIRECTIONS:
            across, up = math.cos(angle) * (reach + width / 2), math.sin(angle) * (reach + height / 2)
            yield distance, Box.around(Point(point.x + across, point.y + up), width, height)


class _Surroundings:
    """What a point's label can collide with: all points' markers, labels placed before, and lines."""

    def __init__(self, i: int, points: np.ndarray, marker: float, placed: np.ndarray, lines: np.ndarray, area: Box):
        self.point, self.lines, self.area = Point(*points[i].tolist()), lines.reshape(-1, 2), area
        self.others = points[(points != points[i]).any(axis=1)]
        self.low = np.concatenate([points - marker / 2, placed.reshape(-1, 4)[:, :2]])
        self.high = np.concatenate([points + marker / 2, placed.reshape(-1, 4)[:, 2:]])
        self.foreign = ((self.low >= points[i]) | (self.high <= points[i])).any(axis=1)  # a leader can avoid them

    def cost(self, box: Box) -> float:
        """How bad a place is."""
        low, high = np.array(box[:2]), np.array(box[2:])
        outside = (low < self.area[:2]).any() or (high > self.area[2:]).any()
        wide_low, wide_high = low - MARGIN, high + MARGIN
        covered = outside + ((wide_low < self.high) & (self.low < wide_high)).all(axis=1).sum()
        if covered:
            return COVERED * float(covered)
        end = box.nearest(self.point)
        distance, leader = math.dist(self.point, end), np.array(along(self.point, end))[:, None]
        crossed = (((leader > self.low) & (leader < self.high)).all(axis=2).any(axis=0) & self.foreign).sum()
        touched = ((self.lines > wide_low) & (self.lines < wide_high)).all(axis=1).sum()
        gaps = np.linalg.norm(self.others - np.clip(self.others, low, high), axis=1)
        return float(CROSSED * crossed + TOUCHED * touched + AMBIGUOUS * (gaps < 2 * distance).sum() + distance)
