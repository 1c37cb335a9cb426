"""Pictures: what they show, that labels stay apart, and that there is one look."""

import dataclasses
import io
import sys
import warnings

import numpy as np
import pytest
from conftest import PHOTO, ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageDraw

from avg_mlx import InputError, draw_explanation, explain, load, plotting
from avg_mlx.bench.measure import STAGES
from avg_mlx.bench.report import plot as plot_bench
from avg_mlx.training.plot import plot_losses

QUESTION = "What is this?"
SIZES = {"wide": (800, 90), "tall": (60, 400), "tiny": (3, 2), "strip": (900, 1), "square": (300, 300)}


def drawn(size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, "gray")
    ImageDraw.Draw(image).ellipse((0, 0, size[0] / 2, size[1] / 2), "red")
    return image


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (save(self, *args, **kw), saved.append(self))[0])
    return saved


@pytest.fixture(scope="module")
def explained(tiny):
    return explain(*tiny, QUESTION, PHOTO)[0]


def texts(figure: Figure) -> list[Text]:
    """All that is written in a figure, but for what is not drawn, such as ticks outside of their axes."""
    drawn: dict[Text, None] = {}
    draw = Text.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", lambda self, *args, **kw: (drawn.setdefault(self), draw(self, *args, **kw))[1])
        FigureCanvasAgg(figure).draw()
    return [text for text in drawn if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("name", SIZES)
def test_a_picture_of_any_shape_is_legible(name, tiny, figures, tmp_path):
    """1200 pixels wide, of a height that fits on a screen or two, with no text outside or upon another."""
    [explanation] = explain(*tiny, QUESTION, drawn(SIZES[name]))
    picture = draw_explanation(explanation, tmp_path / "picture.png", QUESTION * 9)
    with Image.open(picture) as image:
        assert image.width == 1200
        assert 500 < image.height < 1900
    [figure] = figures
    boxes = [(text, text.get_window_extent()) for text in texts(figure)]
    assert len(boxes) > 15
    for n, (text, box) in enumerate(boxes):
        assert text.get_fontsize() >= 6
        assert box.x0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        for other, there in boxes[:n]:
            assert not box.padded(-2).overlaps(there.padded(-2)), (text, other)


def test_the_picture_says_what_was_chosen_and_why(explained, figures, tmp_path):
    draw_explanation(explained, tmp_path / "picture.png", "Whose is it, $5 or <b>?")
    written = "\n".join(text.get_text() for text in texts(figures[0]))
    view, evidence = explained.view, explained.evidence()
    for said in ("Whose is it, $5 or <b>?", f"Granularity {view.granularity}, by the router", f"{view.saved:.1%} saved",
                 f"for {evidence.choice} over {evidence.over}", f"{max(view.routing.probabilities):.1%}"):  # fmt: skip
        assert said in written
    for word in explained.votes.words:
        assert word.text.strip() in written


def test_bars_are_the_words_evidence_in_reading_order(explained, figures, tmp_path):
    draw_explanation(explained, tmp_path / "picture.png")
    *_, words, odds = (axes for axes in figures[0].findobj(match=lambda a: hasattr(a, "containers")) if axes.containers)
    evidence = explained.evidence()
    pairs = sorted(zip(explained.votes.words, evidence.words, strict=True), key=lambda pair: pair[0].position)
    assert [bar.get_width() for bar in words.containers[0]] == pytest.approx([value for _, value in pairs])
    shares = dict(zip(explained.view.routing.granularities, explained.view.routing.probabilities, strict=True))
    assert [bar.get_width() for bar in odds.containers[0]] == pytest.approx([shares[g] for g in sorted(shares)])


def test_a_router_that_keeps_no_words_has_a_picture_too(explained, figures, tmp_path):
    votes = dataclasses.replace(explained.votes, words=())
    draw_explanation(dataclasses.replace(explained, votes=votes), tmp_path / "picture.png")
    assert any("none" in text.get_text() for text in texts(figures[0]))


def test_many_words_share_a_bar(explained, figures, tmp_path):
    [word, *_] = explained.votes.words
    many = [dataclasses.replace(word, position=n, text=f"w{n}", votes=(0.1 * n, 0, 0, 0, 0)) for n in range(40)]
    crowded = dataclasses.replace(explained, votes=dataclasses.replace(explained.votes, words=tuple(many)))
    draw_explanation(crowded, tmp_path / "picture.png")
    axes = next(a for a in figures[0].findobj(match=lambda a: hasattr(a, "containers")) if a.containers)
    widths = [bar.get_width() for bar in axes.containers[0]]
    assert len(widths) == 15
    assert sum(widths) == pytest.approx(sum(crowded.evidence().words))
    assert any("(26 others)" in text.get_text() for text in texts(figures[0]))


def test_another_comparison_can_be_drawn(explained, figures, tmp_path):
    over = next(g for g in (1, 2, 4, 8, 16) if g not in (explained.view.granularity, explained.evidence().over))
    draw_explanation(explained, tmp_path / "picture.png", over=over)
    assert any(f"over {over}" in text.get_text() for text in texts(figures[0]))


@pytest.mark.parametrize("how", ["forced", "without"])
def test_without_a_routers_choice_the_picture_is_of_tokens_alone_and_says_so(how, tiny, tiny_stage3, figures, tmp_path):
    model = load(tiny_stage3) if how == "without" else tiny
    [explanation] = explain(*model, QUESTION, PHOTO, **({"granularity": 4} if how == "forced" else {}))
    draw_explanation(explanation, tmp_path / "picture.png")
    written = " ".join(text.get_text() for text in texts(figures[0]))
    assert "router did not run" in written
    assert ("forced" if how == "forced" else "no router") in written
    assert not any(axes.containers for axes in figures[0].findobj(match=lambda a: hasattr(a, "containers")))


def test_lines_lie_where_the_geometry_says(explained, figures, tmp_path):
    draw_explanation(explained, tmp_path / "picture.png")
    axes = figures[0].findobj(match=lambda artist: hasattr(artist, "containers"))[0]
    lines = {tuple(segment.ravel().round(6)) for lines in axes.collections for segment in lines.get_segments()}
    for crop in explained.geometry.crops[1:]:
        for y in crop.row_edges:
            assert tuple(np.round((crop.column_edges[0], y, crop.column_edges[-1], y), 6)) in lines
        for x in crop.column_edges:
            assert tuple(np.round((x, crop.row_edges[0], x, crop.row_edges[-1]), 6)) in lines


@pytest.mark.parametrize("suffix", plotting.FORMATS)
def test_the_same_explanation_is_the_same_file(explained, suffix, tmp_path):
    first, second = (draw_explanation(explained, tmp_path / f"{name}{suffix}") for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {first.name, second.name}


@pytest.mark.parametrize("place", ["picture.jpg", "picture", "nowhere/picture.png", "folder.png"])
def test_a_place_where_no_picture_can_be_is_named(explained, place, tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="nowhere" if "nowhere" in place else place):
        draw_explanation(explained, tmp_path / place)


def test_without_the_plotting_library_the_remedy_is_named(explained, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'avg-mlx\[plot\]'"):
        draw_explanation(explained, tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []
    assert plot_losses([{"step": 1, "loss": 2.0}], tmp_path) is None


def test_what_the_font_lacks_is_no_warning(explained, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_explanation(explained, tmp_path / "picture.png", "漢字 \U0001f600 \uffff")


def rows() -> list[dict]:
    return [
        {"granularity": g, "visual_tokens": 5 * g, **{stage: {"median": g / 100} for stage in STAGES}}
        for g in (36, 72, 144, 288, 576)
    ]


def test_axes_name_their_scale(figures, tmp_path):
    plot_losses([{"step": n, "loss": 5 / n, "validation_loss": 6 / n} for n in range(1, 9)], tmp_path)
    plot_bench({"model": "$a model$", "rows": rows()}, tmp_path / "bench.png")
    losses, bench = ([axes] for axes in (figures[0].axes[0], figures[1].axes[0]))
    assert "linear scale" in losses[0].get_xlabel()
    assert all("linear scale" in axes.get_ylabel() for axes in (*losses, *bench))
    assert [line.get_xydata().shape for line in losses[0].lines] == [(8, 2), (8, 2)]
    assert all(not axes.spines["top"].get_visible() for axes in (*losses, *bench))
    assert {figure.bbox.width for figure in figures} == {1200}
    assert bench[0].get_title() == "$a model$"


def test_nothing_else_chooses_colours_or_saves_pictures():
    """matplotlib's figures are made, and colours are named, in one module."""
    for file in sorted((ROOT / "avg_mlx").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if file.name != "plotting.py":
            assert ".savefig(" not in text, file
            assert "Figure(" not in text, file


def test_drawing_leaves_the_callers_settings_alone(explained):
    import matplotlib

    before = dict(matplotlib.rcParams)
    with plotting.style():
        assert matplotlib.rcParams["text.parse_math"] is False
    assert dict(matplotlib.rcParams) == before
    figure = Figure()
    figure.savefig(io.BytesIO())
