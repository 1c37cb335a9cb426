"""What SECURITY.md promises of model folders from strangers, where no other test holds it."""

import contextlib
import json

import pytest

from avg_mlx import AvgMlxError, load

CLASSES = {
    "AutoConfig": "code.Config",
    "AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"],
    "AutoModel": "code.Model",
    "AutoModelForCausalLM": "code.Model",
}


@pytest.fixture
def folder(model_folder, tmp_path, monkeypatch):
    """A model folder with code that leaves a mark when it is run, and a user who agrees to run it when asked."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (model_folder / "code.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    return model_folder


def add(file, **keys) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_that_a_config_names_is_not_run(folder, tmp_path, where):
    """Neither in transformers' way nor in mlx-lm's."""
    add(folder / where, auto_map=CLASSES, tokenizer_class="Tokenizer", model_file="code.py")
    with contextlib.suppress(AvgMlxError):  # it may be refused
        load(folder)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("model_type", ["code", "../code", "mlx_lm.models.mistral3"])
def test_a_config_does_not_choose_the_module_that_is_imported(folder, tmp_path, model_type):
    add(folder / "config.json", model_type=model_type)
    with pytest.raises(AvgMlxError, match="model_type"):
        load(folder)
    assert not (tmp_path / "mark").exists()


def test_a_chat_template_cannot_reach_python(folder):
    add(folder / "tokenizer_config.json", chat_template="{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(AvgMlxError, match="unsafe"):
        load(folder)


@pytest.mark.parametrize("id", [512, 100_000, 2**31 - 1, -1, -201])
def test_ids_outside_the_vocabulary_are_not_looked_up(model, id):
    """MLX does not check them: it would return whatever lies beyond the embeddings, or crash."""
    with pytest.raises(AvgMlxError, match=f"token id {id} is not in the vocabulary of 512"):
        model.embed_text([1, id])


def test_a_tokenizer_of_another_model_is_refused(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": 700, "content": "<more>", "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(AvgMlxError, match=r"has id \d+, but the model has 512 tokens"):
        load(folder)
