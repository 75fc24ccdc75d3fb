"""Augmentation against plain loops; batches that repeat, resume and share out; tensors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from espalier.data import Augment, Batches, Dataset
from espalier.data.augment import crop, cutout, flip, mixup


def toy(count: int = 50, shape: tuple[int, ...] = (6, 5, 3), classes: int = 3, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    channels = shape[2] if len(shape) == 3 else 1
    labels = np.arange(count) % classes
    stats = (0.4,) * channels, (0.25,) * channels
    return Dataset("toy", "train", images, labels, np.arange(count), classes, *stats)


def test_tensors_are_the_normalised_images():
    data = toy()
    x, y = data.tensors([4, 2])
    expected = (data.images[[4, 2]] / 255 - 0.4) / 0.25
    torch.testing.assert_close(x.permute(0, 2, 3, 1), torch.from_numpy(expected).float())
    assert y.tolist() == [1, 2]
    assert toy(shape=(6, 5)).tensors()[0].shape == (50, 1, 6, 5)
    whole = torch.ones(1, 3, 6, 5)
    data.normalise(whole)
    assert torch.equal(whole, torch.ones(1, 3, 6, 5))  # its input is left alone


def test_crop_equals_a_loop():
    images = torch.randint(0, 256, (9, 3, 8, 7), dtype=torch.uint8)
    top, left = torch.randint(0, 4, (9,)), torch.randint(0, 3, (9,))
    loop = [im[:, t : t + 5, k : k + 5] for im, t, k in zip(images, top, left, strict=True)]
    assert torch.equal(crop(images, top, left, 5, 5), torch.stack(loop))


def test_flip_equals_a_loop():
    images, which = torch.rand(9, 3, 8, 7), torch.rand(9) < 0.5
    loop = [im.flip(-1) if w else im for im, w in zip(images, which, strict=True)]
    assert torch.equal(flip(images, which), torch.stack(loop))


@pytest.mark.parametrize("length", [1, 4, 5, 20])
def test_cutout_equals_a_loop(length):
    images = torch.rand(9, 3, 8, 7)
    y, x = torch.randint(0, 8, (9,)), torch.randint(0, 7, (9,))
    loop = images.clone()
    for image, cy, cx in zip(loop, y.tolist(), x.tolist(), strict=True):
        top, left = cy - length // 2, cx - length // 2
        image[:, max(0, top) : max(0, top + length), max(0, left) : max(0, left + length)] = 0
    assert torch.equal(cutout(images, y, x, length), loop)


def test_mixup_equals_a_loop():
    images, targets = torch.rand(6, 1, 3, 3), torch.rand(6, 4)
    partner, weight = torch.randperm(6), torch.rand(6)
    got = mixup(images, targets, partner, weight)
    for i, (j, w) in enumerate(zip(partner, weight, strict=True)):
        torch.testing.assert_close(got[0][i], w * images[i] + (1 - w) * images[j])
        torch.testing.assert_close(got[1][i], w * targets[i] + (1 - w) * targets[j])


def test_augment_pads_with_black_and_can_change_the_size():
    images = torch.full((64, 1, 4, 4), 9, dtype=torch.uint8)
    augment = Augment(pad=2, size=5)
    out = augment.geometry(images, augment.draw(64, (1, 4, 4), np.random.default_rng(0)).on("cpu"))
    assert out.shape == (64, 1, 5, 5)
    assert set(out.unique().tolist()) == {0, 9}
    middle = Augment(size=2, centre=True)
    out = middle.geometry(
        torch.arange(16).view(1, 1, 4, 4), middle.draw(1, (1, 4, 4), np.random.default_rng(0)).on("cpu")
    )
    assert out.flatten().tolist() == [5, 6, 9, 10]
    with pytest.raises(ValueError, match="cannot crop 9×9"):
        Augment(size=9).draw(1, (1, 4, 4), np.random.default_rng(0))


def test_the_default_augments_nothing_and_mixup_targets_are_probabilities():
    data = toy()
    plain = next(iter(Batches(data, 50, shuffle=False)))[0]
    assert torch.equal(plain, data.tensors()[0])
    _, targets = next(iter(Batches(data, 50, augment=Augment(mixup=1.0))))
    assert targets.shape == (50, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(50))


FULL = Augment(pad=1, flip=True, cutout=2, mixup=0.5)


def epochs(batches: Batches, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [pair for _ in range(count) for pair in batches]


def same(a: list[tuple[torch.Tensor, torch.Tensor]], b: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def test_batches_cover_the_dataset_once_an_epoch_and_shuffle_anew():
    data = replace(toy(), labels=np.arange(50), classes=50)
    batches = Batches(data, 8)
    first, second = ([y for _, y in batches] for _ in range(2))
    assert len(batches) == len(first) == 7
    assert sorted(torch.cat(first).tolist()) == list(range(50))
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    assert len(list(Batches(data, 8, drop_last=True))) == 6


def test_batches_repeat_with_their_seed_only():
    data = toy()
    once = epochs(Batches(data, 8, seed=1, augment=FULL), 2)
    assert same(once, epochs(Batches(data, 8, seed=1, augment=FULL), 2))
    assert not same(once, epochs(Batches(data, 8, seed=2, augment=FULL), 2))


@pytest.mark.parametrize("stop", [1, 6, 7, 8, 13])
def test_batches_resume_bit_identically(stop):
    data = toy()
    whole = epochs(Batches(data, 8, augment=FULL), 2)
    batches, seen, state = Batches(data, 8, augment=FULL), [], {}
    while len(seen) < stop:
        for pair in batches:
            seen.append(pair)
            state = json.loads(json.dumps(batches.state_dict()))
            if len(seen) == stop:
                break
    resumed = Batches(data, 8, seed=99, augment=FULL)
    resumed.load_state_dict(state)
    while resumed.epoch < 2:
        seen.extend(resumed)
    assert same(seen, whole)


@pytest.mark.parametrize("augment", [FULL, replace(FULL, mixup=0.0)])
def test_ranks_together_see_what_one_process_sees(augment):
    data = toy()
    one = epochs(Batches(data, 8, augment=augment, drop_last=True), 1)
    ranks = [epochs(Batches(data, 8, augment=augment, drop_last=True, rank=r, world=3), 1) for r in range(3)]
    for i, pair in enumerate(one):
        for k, whole in enumerate(pair):
            for r in range(3):
                assert torch.equal(ranks[r][i][k], whole[r::3])


def test_batches_refuse_what_cannot_work():
    with pytest.raises(ValueError, match="empty batch"):
        Batches(toy(50), 64, drop_last=True)
    with pytest.raises(ValueError, match="drop_last=True"):
        Batches(toy(50), 7, world=4)  # the last batch has one image
    with pytest.raises(ValueError, match="rank is in"):
        Batches(toy(), 8, rank=2, world=2)
    with pytest.raises(ValueError, match="an epoch has 7"):
        Batches(toy(), 8).load_state_dict({"seed": 0, "epoch": 0, "batch": 8})
