"""Image features that are kept: found by what the vision tower sees, within bytes, and never trusted when changed."""

import dataclasses
import gc

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from avg_mlx.blas import BLAS
from avg_mlx.inference.caches import CROPS_PER_PASS, VisionCache, encode_images
from avg_mlx.inputs.image import make_crops

SIZES = ((160, 40), (40, 90), (100, 100), (60, 30))
PHOTOS = [Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB") for size in SIZES]


@pytest.fixture(scope="module")
def images(tiny):
    return [make_crops(photo, tiny[0].config) for photo in PHOTOS]


def bytes_of(model, images) -> int:
    return sum(model.encode(crops).nbytes for crops in images)


def alike(features, alone) -> bool:
    """Whether features computed in a batch are those computed alone, to rounding.

    OpenBLAS sums a row in an order that depends on the rows beside it, which may change the last three bits of the
    largest features. MLX's own BLAS does not.
    """
    rounding = 8 * np.finfo(np.float32).eps * np.abs(alone).max() if BLAS == "OpenBLAS" else 1e-5
    return np.allclose(features, alone, atol=rounding)


def test_images_in_a_batch_have_the_features_that_they_have_alone(tiny, images):
    model, _ = tiny
    for crops, features in zip(images, encode_images(model, images), strict=True):
        assert alike(np.array(features), np.array(model.encode(crops)))


def test_several_images_pass_together_but_not_too_many(tiny, images, passes):
    model, _ = tiny
    assert [len(crops) for crops in images] == [4, 3, 5, 3]
    encode_images(model, images * 2)
    assert passes == [15, 15]
    assert max(passes) <= CROPS_PER_PASS < 4 * max(map(len, images))
    assert encode_images(model, []) == []


def test_an_image_is_seen_once(tiny, images, passes):
    cache = VisionCache(tiny[0])
    first = cache.features([images[0], images[1], images[0]])
    assert (cache.misses, cache.hits) == (2, 1)
    assert passes == [len(images[0]) + len(images[1])]
    again = cache.features([images[1], images[0]])
    assert (cache.misses, cache.hits) == (2, 3)
    assert len(passes) == 1
    assert first[0] is first[2]
    for one, other in zip(again, first[1::-1], strict=True):
        assert mx.array_equal(one, other)
    cache.features([images[2], images[0]])
    assert passes[1:] == [len(images[2])]


def test_the_same_picture_is_known_whatever_it_comes_as(tiny, passes):
    model, _ = tiny
    cache = VisionCache(model)
    for picture in (PHOTOS[0], PHOTOS[0].copy(), Image.frombytes("RGB", PHOTOS[0].size, PHOTOS[0].tobytes())):
        cache.features([make_crops(picture, model.config)])
    assert len(passes) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"image_aspect_ratio": "pad"},
        {"grid_pinpoints": ((112, 112),)},
        {"vision.image_mean": (0.5, 0.5, 0.5)},
        {"vision.image_std": (0.5, 0.5, 0.5)},
        {"vision.image_size": 28, "grid_pinpoints": ((28, 56), (56, 56))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_processor_settings_make_another_image(tiny, change):
    config = tiny[0].config
    inner = {key.removeprefix("vision."): value for key, value in change.items() if key.startswith("vision.")}
    outer = {key: value for key, value in change.items() if not key.startswith("vision.")}
    other = dataclasses.replace(config, **outer, vision=dataclasses.replace(config.vision, **inner))
    assert make_crops(PHOTOS[0], config).digest != make_crops(PHOTOS[0], other).digest


def test_what_packing_needs_is_told_apart_too(images):
    crops = images[0]
    digests = {
        crops.digest,
        dataclasses.replace(crops, image_size=(41, 160)).digest,
        dataclasses.replace(crops, crop_grid=(3, 1)).digest,
        dataclasses.replace(crops, pixels=crops.pixels[::-1]).digest,
    }
    assert len(digests) == 4
    assert dataclasses.replace(crops).digest == crops.digest


def test_the_least_recently_used_give_way(tiny, images, passes):
    model, _ = tiny
    one, two, three, _ = images
    cache = VisionCache(model, bytes_of(model, [one, two, three]) - 1)
    cache.features([one])
    cache.features([two])
    cache.features([one])  # now two is the oldest
    cache.features([three])
    assert cache.nbytes == bytes_of(model, [one, three]) <= cache.limit
    del passes[:]
    cache.features([one, three])
    assert passes == []
    cache.features([two])
    assert passes == [len(two)]


@pytest.mark.parametrize("limit", [0, 1000])
def test_what_does_not_fit_is_computed_and_not_kept(tiny, images, limit):
    model, _ = tiny
    cache = VisionCache(model, limit)
    for _ in range(2):
        for crops, features in zip(images, cache.features(images), strict=True):
            assert alike(np.array(features), np.array(model.encode(crops)))
    assert (cache.nbytes, cache.hits, cache.misses) == (0, 0, 2 * len(images))


def test_bytes_held_are_what_memory_holds(tiny, images, no_spare_buffers):
    """Also when part of a batch has given way."""
    model, _ = tiny
    cache = VisionCache(model, bytes_of(model, images[:2]))
    cache.features(images)
    mx.synchronize()  # the stream lets go of its temporaries
    gc.collect()
    with_entries, held = mx.get_active_memory(), cache.nbytes
    assert 0 < held <= cache.limit
    cache.clear()
    assert cache.nbytes == 0
    mx.synchronize()
    gc.collect()
    assert with_entries - mx.get_active_memory() == held


@pytest.mark.parametrize("where", [(0, 0, 0), (2, 15, 63)])
def test_features_that_were_changed_are_computed_anew(tiny, images, where):
    model, _ = tiny
    cache = VisionCache(model)
    cache.features(images[:2])
    [handed_out] = cache.features(images[:1])
    handed_out[where] += 1
    [anew] = cache.features(images[:1])
    assert np.allclose(anew, model.encode(images[0]), atol=1e-5)
    assert (cache.hits, cache.misses) == (1, 3)
    cache.features(images[:2])
    assert (cache.hits, cache.misses) == (3, 3)
