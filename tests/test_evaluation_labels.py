"""Labels of points: in the picture, apart from each other and from every point."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from avg_mlx.evaluation.labels import GAP, Box, Point, along, place

AREA, MARKER = Box(40, 40, 460, 300), 11
POINTS = st.builds(Point, st.integers(45, 455), st.integers(45, 295))
SIZES = st.tuples(st.integers(6, 45), st.integers(7, 10))


def overlap(one: Box, other: Box) -> bool:
    across = one.left < other.right and other.left < one.right
    return across and one.bottom < other.top and other.bottom < one.top


@settings(max_examples=25)
@given(st.lists(st.tuples(POINTS, SIZES), min_size=1, max_size=12), st.booleans())
def test_labels_cover_neither_each_other_nor_a_point(named, joined):
    points, sizes = (list(column) for column in zip(*named, strict=True))
    lines = [p for pair in itertools.pairwise(points) for p in along(*pair)] if joined else points
    boxes = place(points, sizes, MARKER, lines, AREA)
    assert boxes == place(points, sizes, MARKER, lines, AREA)
    for n, (box, (width, height)) in enumerate(zip(boxes, sizes, strict=True)):
        assert (round(box.right - box.left, 6), round(box.top - box.bottom, 6)) == (width, height)
        assert AREA.left <= box.left < box.right <= AREA.right
        assert AREA.bottom <= box.bottom < box.top <= AREA.top
        assert not any(overlap(box, other) for other in boxes[:n])
        assert not any(overlap(box, Box.around(point, MARKER, MARKER)) for point in points)


def test_a_lone_label_is_beside_its_point():
    [box] = place([Point(200, 200)], [(30, 8)], MARKER, [], AREA)
    nearest = box.nearest(Point(200, 200))
    assert abs(nearest.x - 200) + abs(nearest.y - 200) < 2 * (MARKER + GAP)


def test_a_label_is_not_where_another_points_would_be():
    left, right = Point(200, 200), Point(240, 200)
    boxes = place([left, right], [(14, 8), (14, 8)], MARKER, [*along(left, right)], AREA)
    for box, own, other in zip(boxes, (left, right), (right, left), strict=True):
        assert sum((a - b) ** 2 for a, b in zip(box.middle, own, strict=True)) < sum(
            (a - b) ** 2 for a, b in zip(box.middle, other, strict=True)
        )
