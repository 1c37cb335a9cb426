"""Training data: what is learned of it, and what is refused."""

import json
import logging

import pytest
from conftest import CHECKPOINT, IMAGES, RECORDS, conversation, write_samples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from avg_mlx.config import Config
from avg_mlx.errors import InputError
from avg_mlx.inputs.prompt import PLACEHOLDER_ID, SYSTEM_PROMPT, may_fit
from avg_mlx.training.data import IGNORED, read_samples

ASKED = conversation("What is this?", "A cat.")


@pytest.fixture
def read(tmp_path, tiny):
    """`read(records)` → samples of a file that holds them, or a text as it stands."""
    model, tokenizer = tiny

    def run(content, image_folder=None):
        file = write_samples(tmp_path, content)
        if isinstance(content, str):
            file.write_text(content)
        return read_samples(file, image_folder, tokenizer, model.config)

    return run


@pytest.fixture(scope="module")
def samples(data, tiny):
    model, tokenizer = tiny
    return {sample.id: sample for sample in read_samples(data, None, tokenizer, model.config)}


def learned_runs(sample) -> list[tuple[int, ...]]:
    """The stretches of ids that are learned."""
    runs, before = [], IGNORED
    for label in sample.labels:
        if label != IGNORED:
            runs = [*runs[:-1], (*runs[-1], label)] if before != IGNORED else [*runs, (label,)]
        before = label
    return runs


# What is read


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["id"])
def test_learned_are_the_answers_and_their_ends(record, samples, tiny):
    sample = samples[record["id"]]
    answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
    assert [tiny[1].decode(list(run)) for run in learned_runs(sample)] == [f"{answer}</s>" for answer in answers]
    assert sample.answer_tokens == sum(map(len, learned_runs(sample)))
    pairs = zip(sample.ids, sample.labels, strict=True)
    assert all(label in (IGNORED, token) for token, label in pairs)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["id"])
def test_all_is_read_in_order_with_images_at_their_messages_fronts(record, samples, tiny):
    sample = samples[record["id"]]
    text = f"<s>{SYSTEM_PROMPT} "
    names = record.get("image") or []
    names = [names] if isinstance(names, str) else names
    marked = any("<image>" in turn["value"] for turn in record["conversations"])
    for n, turn in enumerate(record["conversations"]):
        images = turn["value"].count("<image>") if marked else len(names) * (n == 0)
        value = "<image>\n" * images + turn["value"].replace("<image>", "").strip()
        text += f"USER: {value} " if turn["from"] == "human" else f"ASSISTANT: {value}</s>"
    pieces, start = [], 0
    for end in [*(k for k, token in enumerate(sample.ids) if token == PLACEHOLDER_ID), len(sample.ids)]:
        pieces.append(tiny[1].decode(list(sample.ids[start:end])))
        start = end + 1
    # Each piece begins with the space that SentencePiece puts before a text.
    ours = "<image>".join([pieces[0], *(piece.removeprefix(" ") for piece in pieces[1:])])
    assert ours.replace("<s> ", "<s>") == text
    assert [image.name for image in sample.images] == names
    assert sample.image_sizes == tuple(IMAGES[name][::-1] for name in names)


def test_positions_are_those_of_the_models_input(samples, tiny):
    from avg_mlx.training.forward import load_crops, seen_sample

    model = tiny[0]
    for sample in samples.values():
        crops = load_crops(model, sample)
        seen = seen_sample(model, sample, [model.encode(c) for c in crops], crops)
        for granularity in model.config.granularities:
            length = len(seen.embeddings(model, [granularity] * len(crops)))
            assert sample.positions(model.config, granularity) == length


@given(st.tuples(st.integers(1, 4000), st.integers(1, 4000)))
def test_no_granularity_takes_more_positions_than_the_finest(size):
    """So that a sample which fits at the finest is cut at none."""
    keys = json.loads((CHECKPOINT / "config.json").read_text())
    vision = json.loads((CHECKPOINT / "clip" / "config.json").read_text())
    config = Config.from_dict(keys | {"vision_config": vision})
    counts = {g: config.visual_tokens(g, size) for g in config.granularities}
    assert max(counts.values()) == counts[config.finest]


def test_json_lines_are_the_same_as_a_list(read):
    lines = "\n".join(json.dumps(record) for record in RECORDS) + "\n\n"
    assert read(lines) == read(RECORDS)


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\u2029"])
def test_json_lines_end_at_newlines_only(separator, read):
    record = {"id": "a", "conversations": conversation(f"one{separator}two", "three")}
    lines = json.dumps(record, ensure_ascii=False) + "\n"
    assert read(lines) == read([record])


def test_image_folder(read, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    Image.new("RGB", (64, 32)).save(folder / "only_here.png")
    [sample] = read([{"image": "only_here.png", "conversations": ASKED}], folder)
    assert sample.images == (folder / "only_here.png",)
    assert sample.image_sizes == ((32, 64),)


def test_a_rotated_photos_size_is_the_one_it_is_seen_in(read, tmp_path):
    image = Image.new("RGB", (90, 40))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    [sample] = read([{"image": "turned.jpg", "conversations": ASKED}])
    assert sample.image_sizes == ((90, 40),)


# Too long


def test_samples_too_long_are_skipped_and_counted(data, tiny, samples, caplog):
    model, tokenizer = tiny
    lengths = {name: sample.positions(model.config, model.config.finest) for name, sample in samples.items()}
    limit = sorted(lengths.values())[3]
    with caplog.at_level(logging.WARNING, "avg_mlx"):
        fitting = read_samples(data, None, tokenizer, model.config, limit)
    assert [sample for sample in samples.values() if lengths[sample.id] <= limit] == fitting
    assert len(fitting) == 4
    assert caplog.messages == [f"2 of 6 samples skipped: they take more than {limit} positions"]


def test_the_context_is_the_limit_that_cannot_be_raised(read, tmp_path, tiny, caplog):
    model, tokenizer = tiny
    long = {"id": "long", "conversations": conversation("word " * model.config.context_length, "no")}
    file = write_samples(tmp_path, [long, RECORDS[0]])
    with caplog.at_level(logging.WARNING, "avg_mlx"):
        fitting = read_samples(file, None, tokenizer, model.config, 10**6)
    assert [sample.id for sample in fitting] == ["one"]
    assert "1 of 2 samples skipped" in caplog.text


@pytest.mark.parametrize("turns", [1, 1000])
def test_ten_megabytes_of_text_are_not_tokenized(turns, tmp_path, tiny, caplog, encoded):
    """They would take half a minute, and many turns of them hours."""
    model, tokenizer = tiny
    text = "word " * (1_000_000 // turns)
    file = write_samples(tmp_path, [{"id": "long", "conversations": conversation(*[text] * 2 * turns)}, RECORDS[0]])
    with caplog.at_level(logging.WARNING, "avg_mlx"):
        fitting = read_samples(file, None, tokenizer, model.config, None)
    assert [sample.id for sample in fitting] == ["one"]
    assert "1 of 2 samples skipped" in caplog.text
    assert max(encoded) < 1000


def test_turns_of_a_sample_too_long_are_not_looked_at(tmp_path, tiny, encoded):
    """Each is tokenized with all before it."""
    model, tokenizer = tiny
    file = write_samples(tmp_path, [{"id": "long", "conversations": conversation(*["a"] * 200)}])
    assert read_samples(file, None, tokenizer, model.config, None) == []
    assert len(encoded) <= 3  # of which two look whether the tokenizer guards a leading space


@given(st.text(max_size=300))
def test_no_text_that_fits_is_taken_for_one_too_long(tokenizer, text):
    assert may_fit(tokenizer, len(text), len(tokenizer.encode(text)))


def test_nothing_is_said_where_all_fit(data, tiny, caplog):
    model, tokenizer = tiny
    with caplog.at_level(logging.WARNING, "avg_mlx"):
        assert len(read_samples(data, None, tokenizer, model.config, None)) == len(RECORDS)
    assert caplog.messages == []


# Its key


BASE = {"id": "x", "image": "wide.png", "conversations": conversation("Which?", "This one.")}


@pytest.mark.parametrize(
    "change",
    [
        {"id": "y"},
        {"image": "large.png"},
        {"image": ["wide.png", "wide.png"]},
        {"image": None},
        {"conversations": conversation("What?", "This one.")},
        {"conversations": conversation("Which?", "That one.")},
        {"conversations": conversation("Which?", "This one.", "Sure?", "Yes.")},
    ],
    ids=json.dumps,
)
def test_the_key_changes_with_what_is_said_and_seen(change, read):
    [before], [after] = read([BASE]), read([BASE | change])
    assert before.key != after.key


def test_the_key_changes_with_an_images_size(read, tmp_path):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (50, 50)).save(tmp_path / "other" / "wide.png")
    [before], [after] = read([BASE]), read([BASE], tmp_path / "other")
    assert before.ids == after.ids
    assert before.key != after.key


def test_the_key_changes_with_an_image_that_was_replaced(read, tmp_path):
    """By one of the same name and size."""
    (tmp_path / "other").mkdir()
    Image.new("RGB", IMAGES["wide.png"]).save(tmp_path / "other" / "wide.png")
    [before], [after] = read([BASE]), read([BASE], tmp_path / "other")
    assert before.image_sizes == after.image_sizes
    assert before.key != after.key


def test_the_key_does_not_change_with_the_folder(read, tmp_path):
    [before] = read([BASE])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_samples(elsewhere, [BASE])
    [after] = read([BASE], elsewhere)
    assert before.images != after.images
    assert before.key == after.key


# What is refused


@pytest.mark.parametrize("lines", [False, True])
def test_all_missing_image_files_are_listed(lines, read, tmp_path):
    records = [
        {"image": "lost.png", "conversations": ASKED},
        {"image": ["wide.png", "gone/too.png"], "conversations": ASKED},
        {"image": "lost.png", "conversations": ASKED},
    ]
    content = "\n".join(map(json.dumps, records)) if lines else records
    with pytest.raises(InputError) as error:
        read(content)
    files = f"{tmp_path / 'gone/too.png'}, {tmp_path / 'lost.png'}"
    assert f"2 image files are missing: {files}; " in str(error.value)
    assert "image_folder" in str(error.value)


def test_an_image_name_too_long_for_a_file_is_missing(read):
    with pytest.raises(InputError, match="1 image files are missing"):
        read([{"image": "data:image/png;base64," + "A" * 5000, "conversations": ASKED}])


@pytest.mark.parametrize("name", ["../{elsewhere}/wide.png", "{absolute}", "link.png"])
def test_strict_paths_keep_images_in_the_folder(name, tmp_path, tmp_path_factory, tiny):
    model, tokenizer = tiny
    elsewhere = write_samples(tmp_path_factory.mktemp("elsewhere"), []).parent
    (tmp_path / "link.png").symlink_to(elsewhere / "wide.png")
    name = name.format(elsewhere=elsewhere.name, absolute=tmp_path / "wide.png")
    file = write_samples(tmp_path, [{"id": "x", "image": ["wide.png", name], "conversations": ASKED}])
    assert len(read_samples(file, None, tokenizer, model.config, None)) == 1
    with pytest.raises(
        InputError, match=rf"sample 1 \(x\): the image {name} is outside of {tmp_path}, which strict_paths"
    ):
        read_samples(file, None, tokenizer, model.config, None, strict_paths=True)


GOOD = json.dumps({"conversations": ASKED})


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (f"[\n{GOOD},\n{{'id': 1}}\n]", 3),
        (f"[\n{GOOD}\n", 3),
        (f"{GOOD}\n\n{GOOD[:-1]}\n{GOOD}\n", 3),
        ("conversations: none", 1),
    ],
)
def test_unreadable_json_is_told_with_its_line(content, line, read):
    with pytest.raises(InputError, match=r"data\.json.* not valid JSON .* column \d+\)$") as error:
        read(content)
    assert f"line {line}" in str(error.value)


@pytest.mark.parametrize("content", ["[]", "", "\n \n"])
def test_an_empty_dataset(content, read):
    with pytest.raises(InputError, match=r"data\.json has no samples; expected a list of id, image and conversations"):
        read(content)


def test_a_file_that_is_not_text(tmp_path, tiny):
    file = tmp_path / "data.json"
    file.write_bytes(b"\xff\xfe[]")
    with pytest.raises(InputError, match=r"data\.json.*UTF-8"):
        read_samples(file, None, tiny[1], tiny[0].config)


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_a_file_that_is_none(name, tmp_path, tiny):
    with pytest.raises(InputError, match="give a JSON list or a JSON Lines file"):
        read_samples(tmp_path / name, None, tiny[1], tiny[0].config)


def test_an_image_that_is_none(read, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken\.png"):
        read([{"image": "broken.png", "conversations": ASKED}])


@pytest.mark.parametrize("record", [7, "text", None, [], {}, {"conversations": "talk"}, {"conversations": None}])
def test_a_sample_of_the_wrong_type(record, read):
    with pytest.raises(InputError, match="sample 2 is not an object with a list of conversations"):
        read([{"conversations": ASKED}, record])


@pytest.mark.parametrize("image", [7, {"a": 1}, [7], ["wide.png", None], True])
def test_an_image_of_the_wrong_type(image, read):
    with pytest.raises(InputError, match=r"sample 1 \(x\): image is .*, expected a file name or a list of them"):
        read([{"id": "x", "image": image, "conversations": ASKED}])


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "user", "value": "Hi"},
        {"from": "system", "value": "Be kind."},
        {"from": None, "value": "Hi"},
        {"from": ["human"], "value": "Hi"},
        {"value": "Hi"},
        {"from": "human"},
        {"from": "human", "value": 7},
        "Hi",
        None,
    ],
    ids=json.dumps,
)
def test_a_turn_of_an_unknown_role_or_type(turn, read):
    with pytest.raises(InputError, match=r"sample 1 \(x\): a turn is .*, expected from human or gpt, and a value"):
        read([{"id": "x", "conversations": [turn, ASKED[1]]}])


@pytest.mark.parametrize(
    "turns",
    [
        [],
        ASKED[:1],
        ASKED[1:],
        ASKED[::-1],
        [*ASKED, ASKED[0]],
        [ASKED[0], *ASKED],
        [*ASKED, ASKED[1]],
    ],
    ids=["none", "no answer", "no question", "answer first", "open end", "two questions", "two answers"],
)
def test_turns_out_of_order_or_without_an_answer(turns, read):
    with pytest.raises(InputError, match=r"sample 1 \(x\): its turns are \[.*\]; expected human and gpt in turn"):
        read([{"id": "x", "conversations": turns}])


@pytest.mark.parametrize(
    ("image", "question", "said"),
    [
        (None, "<image>\nWhat?", ["1 <image>", "0 images"]),
        ("wide.png", "<image>\n<image>\nWhat?", ["2 <image>", "1 images"]),
        (["wide.png", "tall.png"], "<image>\nWhat?", ["1 <image>", "2 images"]),
        ("wide.png", "<image>", ["empty"]),
        (None, " ", ["empty"]),
    ],
)
def test_placeholders_without_images_and_images_without_placeholders(image, question, said, read):
    with pytest.raises(InputError) as error:
        read([{"id": "x", "image": image, "conversations": conversation(question, "A cat.")}])
    assert all(part in str(error.value) for part in ["sample 1 (x): ", *said])


def test_an_image_in_an_answer(read):
    with pytest.raises(InputError, match=r"sample 1 \(x\): an answer has <image>"):
        read([{"id": "x", "image": "wide.png", "conversations": conversation("Draw a cat.", "<image>\nHere.")}])


def test_an_empty_answer(read):
    with pytest.raises(InputError, match=r"sample 1 \(x\): .*empty"):
        read([{"id": "x", "conversations": conversation("Well?", " ")}])


def test_damaged_images_are_named_before_training(read, tmp_path):
    records = [{"id": n, "image": f"{n}.jpg", "conversations": conversation("<image>\nWhat?", "So.")} for n in range(3)]
    for n in range(3):
        Image.effect_noise((64, 48), 90).save(tmp_path / f"{n}.jpg")
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"1 images cannot be learned from: .*1\.jpg is damaged"):
        read(records)


def test_a_sample_without_an_id_is_the_same_wherever_its_file_lies(tiny, tmp_path):
    keys = set()
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        data = write_samples(tmp_path / folder, [{"conversations": conversation("Why?", "So.")}])
        [sample] = read_samples(data, None, tiny[1], tiny[0].config)
        keys.add((sample.id, sample.key))
    assert len(keys) == 1
