"""Parsing the checkpoint's keys: what is understood, and what is refused in which words."""

import json
import math
from dataclasses import FrozenInstanceError

import pytest
from conftest import CHECKPOINT, GRANULARITIES
from hypothesis import given
from hypothesis import strategies as st

from avg_mlx import InputError
from avg_mlx.config import CLIP_LARGE, KNOWN_TOWERS, Config, VisionConfig

GOLDEN_KEYS = json.loads((CHECKPOINT / "config.json").read_text())
TOWER_KEYS = json.loads((CHECKPOINT / "clip" / "config.json").read_text())
ABSENT = object()


def parse(**changes) -> Config:
    """The golden config with some keys changed, or taken away; `tower` holds changes to the vision tower's."""
    keys = GOLDEN_KEYS | {"vision_config": TOWER_KEYS | changes.pop("tower", {})} | changes
    return Config.from_dict({key: value for key, value in keys.items() if value is not ABSENT})


def test_golden_keys():
    config = parse()
    assert config == Config(
        text={
            **{key: value for key, value in GOLDEN_KEYS.items() if value is not None},
            "model_type": "llama",
            "vision_config": TOWER_KEYS,
        },
        vision=VisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=336,
            patch_size=14,
            layer_norm_eps=1e-5,
            hidden_act="quick_gelu",
        ),
        hidden_size=64,
        vocab_size=512,
        context_length=4096,
        layout="llava",
        vision_layers=3,
        projector_depth=2,
        granularities=GRANULARITIES,
        image_aspect_ratio="anyres",
        grid_pinpoints=((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336)),
        has_newline=True,
        filtered_text_num=32,
        has_router=True,
    )
    assert config.vision.patch_grid == (24, 24)
    assert config.finest == 576
    assert config.voter_size == 1148


def test_a_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        parse().vocab_size = 1


@pytest.mark.parametrize(
    "pinpoints",
    ["[[336, 672], [1008, 336]]", "[(336, 672), (1008, 336)]", [[336, 672], [1008, 336]], ((336, 672), (1008, 336))],
)
def test_pinpoints_turn_to_height_and_width_in_any_notation(pinpoints):
    assert parse(image_grid_pinpoints=pinpoints).grid_pinpoints == ((672, 336), (336, 1008))


@pytest.mark.parametrize("notation", [list, tuple, str])
@given(order=st.permutations(GRANULARITIES))
def test_granularities_keep_the_configs_order(notation, order):
    config = parse(vis_token_granularity=notation(order))
    assert config.granularities == tuple(order)
    assert config.finest == 576


@pytest.mark.parametrize(
    ("changes", "attribute", "value"),
    [
        ({"filtered_text_num": ABSENT}, "filtered_text_num", 32),
        ({"filtered_text_num": 8}, "filtered_text_num", 8),
        ({"filtered_text_num": 8}, "voter_size", 1124),
        ({"filtered_text_num": 0}, "voter_size", 1116),
        ({"router_select": ABSENT}, "has_router", False),
        ({"router_select": False}, "has_router", False),
        ({"vis_token_granularity": ABSENT}, "granularities", (576,)),
        ({"mm_vision_select_layer": ABSENT}, "vision_layers", 3),
        ({"tokenizer_model_max_length": 2048}, "context_length", 2048),
        ({"tokenizer_model_max_length": 8192}, "context_length", 4096),
        ({"tokenizer_model_max_length": ABSENT}, "context_length", 4096),
        ({"mm_projector_type": "mlp1x_gelu"}, "projector_depth", 1),
        ({"mm_projector_type": "mlp3x_gelu"}, "projector_depth", 3),
        (
            {"image_aspect_ratio": "pad", "image_grid_pinpoints": ABSENT, "mm_patch_merge_type": "flat"},
            "grid_pinpoints",
            (),
        ),
    ],
)
def test_optional_keys(changes, attribute, value):
    assert getattr(parse(**changes), attribute) == value


@pytest.mark.parametrize(("select_layer", "layers"), [(-1, 4), (-2, 3), (-5, 0), (0, 0), (3, 3), (4, 4)])
def test_select_layer_counts_hidden_states_from_the_embeddings(select_layer, layers):
    assert parse(mm_vision_select_layer=select_layer).vision_layers == layers


@pytest.mark.parametrize(("keys", "tied"), [({}, False), ({"tie_word_embeddings": True}, True)])
def test_embeddings_are_untied_unless_the_config_says_so(keys, tied):
    untold = {key: value for key, value in GOLDEN_KEYS.items() if key != "tie_word_embeddings"}
    config = Config.from_dict({**untold, "vision_config": TOWER_KEYS, **keys})
    assert config.text["tie_word_embeddings"] is tied


@pytest.mark.parametrize(("aspect", "tokens"), [("anyres", 6 * 6 + 10 * 13), ("pad", 6 * 6)])
def test_visual_tokens_follow_the_aspect_ratio(aspect, tokens):
    assert parse(image_aspect_ratio=aspect).visual_tokens(36, (480, 640)) == tokens


@pytest.mark.parametrize(
    ("changes", "found", "expected"),
    [
        ({"model_type": "llava"}, "model_type is 'llava'", "'llava_llama'"),
        ({"model_type": ABSENT}, "model_type is None", "'llava_llama'"),
        ({"vision_config": ABSENT}, "PyTorch checkpoint", "avg-mlx convert --hf-path"),
        ({"image_aspect_ratio": "square"}, "image_aspect_ratio is 'square'", "'anyres' and 'pad'"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type is 'flat'", "'spatial_unpad'"),
        ({"mm_patch_merge_type": ABSENT}, "mm_patch_merge_type is 'flat'", "'spatial_unpad'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'", "'patch'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'", "'mlpNx_gelu'"),
        ({"mm_projector_type": ABSENT}, "mm_projector_type is 'linear'", "'mlpNx_gelu'"),
        ({"mm_projector_type": "mlp0x_gelu"}, "mm_projector_type is 'mlp0x_gelu'", "N = 1, 2"),
        ({"mm_vision_select_layer": 5}, "mm_vision_select_layer is 5", "4 layers"),
        ({"mm_vision_select_layer": -6}, "mm_vision_select_layer is -6", "4 layers"),
        ({"vis_token_granularity": [36, 100]}, "granularity 100", "24×24"),
        ({"vis_token_granularity": [0]}, "granularity 0", "24×24"),
        ({"vis_token_granularity": [-36]}, "granularity -36", "24×24"),
        ({"vis_token_granularity": [1152]}, "granularity 1152", "24×24"),
        ({"vis_token_granularity": [36.0]}, "granularity 36.0", "24×24"),
        ({"vis_token_granularity": ["36"]}, "granularity '36'", "24×24"),
        ({"vis_token_granularity": [36, 576, 36]}, "[36, 576, 36]", "different"),
        ({"vis_token_granularity": []}, "vis_token_granularity is []", "one or more"),
        ({"vis_token_granularity": 36}, "vis_token_granularity is 36", "one or more"),
        ({"vis_token_granularity": "36 and 72"}, "vis_token_granularity is '36 and 72'", "one or more"),
        ({"image_grid_pinpoints": [[336, 500]]}, "[[336, 500]]", "multiples of 336"),
        ({"image_grid_pinpoints": [[336, 0]]}, "[[336, 0]]", "multiples of 336"),
        ({"image_grid_pinpoints": [[336, 672, 1]]}, "[[336, 672, 1]]", "[width, height]"),
        ({"image_grid_pinpoints": [336]}, "image_grid_pinpoints is [336]", "[width, height]"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints is []", "[width, height]"),
        ({"image_grid_pinpoints": "(1x1),(2x2)"}, "'(1x1),(2x2)'", "[width, height]"),
        ({"image_grid_pinpoints": ABSENT}, "image_grid_pinpoints is None", "[width, height]"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000", "at most 256"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000", "up to 16777216"),
        ({"tower": {"num_hidden_layers": 10**6}}, "num_hidden_layers is 1000000", "at most 256"),
        ({"tower": {"image_size": 14 << 20}}, "image_size is 14680064", "at most 4096"),
        ({"tower": {"patch_size": 1}}, "patches is 112896", "at most 16384"),
        ({"layer_types": [1, 2, 3]}, "layer_types is [1, 2, 3]", "a list of names"),
        ({"mm_projector_type": "mlp10000000x_gelu"}, "mm_projector_type is 'mlp10000000x_gelu'", "N = 1, 2"),
        ({"image_grid_pinpoints": [[336, 336 * 65]]}, "336×21840", "at most 64"),
        ({"image_grid_pinpoints": [[336, 336]] * 10**6}, "[[336, 336], [336, 336],", "[width, height]"),
        ({"image_grid_pinpoints": "[[336, 336]" + ", [336, 336]" * 10**5 + "]"}, "image_grid_pinpoints", "[width"),
        ({"image_grid_pinpoints": "(" * 5000 + ")" * 5000}, "image_grid_pinpoints is '((", "[width, height]"),
        ({"image_grid_pinpoints": [["336", 336.0]]}, "[['336', 336.0]]", "[width, height]"),
        ({"vis_token_granularity": [36] * 10**6}, "vis_token_granularity is [36, 36,", "at most 256"),
        ({"vis_token_granularity": [True]}, "granularity True", "24×24"),
        ({"rope_theta": math.inf}, "rope_theta is inf", "a number above 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1", "a number above 0"),
        ({"rope_traditional": 1}, "rope_traditional is 1", "true or false"),
        ({"eos_token_id": [2, "3"]}, "eos_token_id is [2, '3']", "a token's number"),
        ({"quantization": {"group_size": 0, "bits": 4}}, "group_size is 0", "a whole number above 0"),
        ({"quantization": {"lm_head": {"bits": "4"}}}, "bits is '4'", "a whole number above 0"),
        ({"tower": {"image_mean": [0.5]}}, "image_mean is [0.5]", "a list of three numbers"),
        ({"tower": {"image_mean": [0.5, 0.5, math.nan]}}, "image_mean is [0.5, 0.5, nan]", "a list of three numbers"),
        ({"tower": {"image_std": [1, 1, 0]}}, "image_std is (1, 1, 0)", "divided"),
        ({"tower": {"hidden_act": "relu"}}, "hidden_act is 'relu'", "'quick_gelu' and 'gelu'"),
        ({"tower": {"patch_size": 16, "image_size": 330}}, "330 pixels", "16-pixel patches"),
    ],
)
def test_what_cannot_be_run_is_named_with_what_can(changes, found, expected):
    with pytest.raises(InputError) as error:
        parse(**changes)
    assert found in str(error.value)
    assert expected in str(error.value)


def test_a_message_is_short_however_much_it_is_about():
    with pytest.raises(InputError) as error:
        parse(vis_token_granularity=["x" * 10**6] * 200)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("key", ["rope_theta", "rope_traditional", "rope_scaling", "head_dim", "layer_types"])
def test_null_counts_as_not_given(key):
    assert key not in parse(**{key: None}).text


def test_all_missing_keys_are_listed_at_once():
    with pytest.raises(InputError, match=r"config\.json lacks hidden_size, vocab_size, image_aspect_ratio;"):
        parse(hidden_size=ABSENT, vocab_size=ABSENT, image_aspect_ratio=ABSENT)
    with pytest.raises(InputError, match="vision tower's config lacks hidden_size, image_size;"):
        VisionConfig.from_dict({k: v for k, v in TOWER_KEYS.items() if k not in ("hidden_size", "image_size")})


def test_a_tower_inside_a_whole_clip_config():
    whole = {"model_type": "clip", "hidden_size": 512, "text_config": {"hidden_size": 7}, "vision_config": TOWER_KEYS}
    assert VisionConfig.from_dict(whole) == VisionConfig.from_dict(TOWER_KEYS)


def test_pixel_statistics_of_the_tower():
    vision = VisionConfig.from_dict(TOWER_KEYS | {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]})
    assert (vision.image_mean, vision.image_std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert VisionConfig.from_dict(TOWER_KEYS).image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert VisionConfig.from_dict(TOWER_KEYS).image_std == (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(
    ("name", "patches"), [("openai/clip-vit-large-patch14", 16), ("openai/clip-vit-large-patch14-336", 24)]
)
def test_known_towers_have_the_shapes_of_the_tensor_table(name, patches):
    vision = VisionConfig.from_dict(KNOWN_TOWERS[name])
    assert vision.patch_grid == (patches, patches)
    assert (vision.hidden_size, vision.intermediate_size) == (1024, 4096)
    assert (vision.num_hidden_layers, vision.num_attention_heads) == (24, 16)
    assert vision.hidden_act == CLIP_LARGE["hidden_act"] == "quick_gelu"


@given(st.lists(st.integers(-2, 600), max_size=4))
def test_any_list_of_granularities_is_pooled_exactly_or_refused(granularities):
    pooling = {1, 4, 9, 16, 36, 64, 72, 144, 288, 576}
    usable = bool(granularities) and set(granularities) <= pooling and len(set(granularities)) == len(granularities)
    if usable:
        assert math.prod(parse(vis_token_granularity=granularities).granularities) == math.prod(granularities)
    else:
        with pytest.raises(InputError):
            parse(vis_token_granularity=granularities)
