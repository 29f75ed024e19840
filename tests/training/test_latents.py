"""The store of posteriors and the encoder: the same bits with and without it, whoever writes, whatever is damaged."""

import io
import multiprocessing
import os
import signal
import socket
import threading
import time

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

from echo4o_hf.miniature.training import SHARED, miniature_config
from echo4o_hf.model.packing import patchify
from echo4o_hf.model.processing_bagel import BagelProcessor
from echo4o_hf.training.collator import PackCollator
from echo4o_hf.training.latents import LatentEncoder, LatentStore, latents_from_moments, precompute, vae_id
from echo4o_hf.training.rows import FEATURES
from echo4o_hf.training.samples import Picture, SampleBuilder, SampleError, training_sizes

PATCH = 2


def make_vae(seed=0, dtype=torch.float32, **config):
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=3,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **config,
    )
    return vae.to(dtype).eval()


def make_picture(key="0a-32x48", seed=0, height=32, width=48, start=0, sampled=True):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(3, height, width, generator=generator) * 2 - 1
    eps = torch.randn(3, height // 4, width // 4, generator=generator) if sampled else None
    return Picture(key=key, start=start, grid=(height // 8, width // 8), pixels=pixels, eps=eps, moments=None)


@pytest.fixture
def vae():
    return make_vae()


@pytest.fixture
def store(vae, tmp_path):
    return LatentStore(tmp_path, vae_id(vae))


@pytest.fixture(autouse=True)
def warnings():
    """caplog sees what transformers' loggers say."""
    logging.enable_propagation()
    yield
    logging.disable_propagation()


@pytest.fixture
def encodings(vae, monkeypatch):
    """Shapes of what the VAE encodes from now on."""
    shapes = []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: (shapes.append(tuple(pixels.shape)), encode(pixels))[1])
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampled", [True, False])
def test_a_store_changes_no_bit(tmp_path, dtype, sampled):
    vae = make_vae(dtype=dtype)
    store = LatentStore(tmp_path, vae_id(vae))
    picture = make_picture(sampled=sampled)
    (without,) = LatentEncoder(vae, PATCH).encode([picture])
    (filling,) = LatentEncoder(vae, PATCH, store).encode([picture])
    kept = store.get(picture.key)
    assert kept.dtype == dtype and kept.shape == (6, 8, 12)
    cached = latents_from_moments(kept, picture.eps, vae.config, PATCH)
    assert without.dtype == torch.float32 and without.shape == (4 * 6, PATCH**2 * 3)
    assert torch.equal(without, filling) and torch.equal(without, cached)


def test_latents_are_scale_times_sample_minus_shift(vae):
    picture = make_picture()
    with torch.no_grad():
        posterior = vae.encode(picture.pixels[None]).latent_dist
    sample = posterior.mean + torch.exp(posterior.logvar / 2) * picture.eps
    (tokens,) = LatentEncoder(vae, PATCH).encode([picture])
    torch.testing.assert_close(tokens, patchify((sample[0] - 0.12) * 0.36, PATCH))


def test_pictures_beside_others_are_encoded_as_alone(vae):
    encoder = LatentEncoder(vae, PATCH)
    pictures = [make_picture("a1"), make_picture("b2", 1), make_picture("c3", 2, 64, 16)]
    together = encoder.encode(pictures)
    for picture, tokens in zip(pictures, together, strict=True):
        assert torch.equal(tokens, encoder.encode([picture])[0])


def test_autocast_changes_no_bit(vae):
    picture = make_picture()
    outside = LatentEncoder(vae, PATCH).encode([picture])[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = LatentEncoder(vae, PATCH).encode([picture])[0]
    assert torch.equal(inside, outside)


def test_a_picture_twice_in_a_batch_is_encoded_once_with_noise_of_its_own(vae, encodings):
    first, second = make_picture(), make_picture()
    second.eps = -first.eps
    tokens = LatentEncoder(vae, PATCH).encode([first, second])
    assert encodings == [(1, 3, 32, 48)]
    assert not torch.equal(*tokens)


def test_moments_at_hand_are_not_encoded_again(vae, encodings):
    picture = make_picture()
    (expected,) = LatentEncoder(vae, PATCH).encode([picture])
    (picture.moments,) = LatentEncoder(vae, PATCH).moments([picture.pixels])
    picture.pixels = None
    encodings.clear()
    assert torch.equal(LatentEncoder(vae, PATCH).encode([picture])[0], expected)
    assert encodings == []


def test_fill_writes_where_each_picture_starts(vae):
    encoder = LatentEncoder(vae, PATCH)
    pictures = [make_picture("a1", start=2), make_picture("b2", 1, 16, 16, start=28)]
    batch = {"latents": torch.full((1, 40, 12), 7.0), "pictures": pictures}
    encoder.fill(batch)
    first, second = encoder.encode(pictures)
    seven = torch.full((12,), 7.0)
    expected = torch.cat([seven.expand(2, 12), first, seven.expand(2, 12), second, seven.expand(8, 12)])
    assert torch.equal(batch["latents"][0], expected)


def test_latents_that_are_not_finite_are_an_error(vae, store):
    with torch.no_grad():
        vae.encoder.conv_in.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite latents of a picture of \(3, 32, 48\) in torch.float32"):
        LatentEncoder(vae, PATCH).encode([make_picture()])


def test_a_vae_is_known_by_weights_dtype_and_config():
    same = [vae_id(make_vae()), vae_id(make_vae())]
    changed = make_vae()
    with torch.no_grad():
        changed.encoder.conv_in.bias[0] += 1e-6
    tiled = make_vae()
    tiled.enable_tiling()
    others = [changed, tiled, make_vae(dtype=torch.bfloat16), make_vae(force_upcast=False), make_vae(seed=1)]
    assert same[0] == same[1]
    assert len({same[0], *map(vae_id, others)}) == 1 + len(others)


def test_where_a_vae_was_loaded_from_does_not_matter(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    assert vae_id(AutoencoderKL.from_pretrained(tmp_path)) == vae_id(vae)


def test_vaes_share_no_entries(vae, store, tmp_path):
    other = make_vae(seed=1)
    picture = make_picture()
    LatentEncoder(vae, PATCH, store).encode([picture])
    others = LatentStore(tmp_path, vae_id(other))
    assert store.get(picture.key) is not None and others.get(picture.key) is None
    with pytest.raises(ValueError, match=f"not of this VAE, whose id is {vae_id(other)}"):
        LatentEncoder(other, PATCH, store)


def entry(store):
    (path,) = store.folder.rglob("*.safetensors")
    return path


@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "bit", "foreign"])
def test_a_damaged_entry_is_named_and_made_again(vae, store, caplog, damage):
    encoder, picture = LatentEncoder(vae, PATCH, store), make_picture()
    (expected,) = encoder.encode([picture])
    path = entry(store)
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-1] ^= 1
    changed = {"empty": b"", "cut": content[:-5], "zeros": bytes(len(content)), "bit": content, "foreign": b"{}" * 99}
    path.write_bytes(changed[damage])
    assert store.get(picture.key) is None
    assert str(path) in caplog.text and "damaged" in caplog.text
    assert torch.equal(encoder.encode([picture])[0], expected)
    kept = store.get(picture.key)
    assert torch.equal(latents_from_moments(kept, picture.eps, vae.config, PATCH), expected)


def test_a_missing_entry_is_not_damaged(store, caplog):
    assert store.get("abc") is None
    assert caplog.text == ""


@pytest.mark.parametrize("key", ["../a", "a/b", "", "A1", ".ab"])
def test_keys_are_file_names(store, key):
    with pytest.raises(ValueError, match="is no file name"):
        store.get(key)


def write_for_ever(folder, key, ready):
    store = LatentStore(folder, "v")
    for value in range(10**9):
        store.put(key, torch.full((6, 16, 16), float(value)))
        ready.set()


def test_processes_may_write_the_same_key_and_be_killed(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = [context.Event() for _ in range(3)]
    writers = [context.Process(target=write_for_ever, args=(tmp_path, "abc", event)) for event in ready]
    for writer in writers:
        writer.start()
    assert all(event.wait(60) for event in ready)
    store = LatentStore(tmp_path, "v")
    for _ in range(200):
        moments = store.get("abc")
        assert moments is not None and (moments == moments[0, 0, 0]).all()
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    moments = store.get("abc")
    assert moments is not None and (moments == moments[0, 0, 0]).all()


@pytest.fixture(scope="module")
def processor():
    return BagelProcessor.from_pretrained(SHARED / "processor")


def miniature_vae():
    return AutoencoderKL.from_pretrained(SHARED / "vae", torch_dtype=torch.float32)


def parts(processor, folder=None, **options):
    """A builder, and an encoder with the same store."""
    vae, config = miniature_vae(), miniature_config(processor)
    store = None if folder is None else LatentStore(folder, vae_id(vae))
    sizes = training_sizes(processor, config)
    builder = SampleBuilder(processor, config, vae.config, sizes=sizes, max_tokens=256, store=store, **options)
    return builder, LatentEncoder(vae, config.latent_patch_size, store)


def file(seed, height=64, width=64):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return {"bytes": written.getvalue(), "path": None}


def make_rows(count, damaged=()):
    """Drawings of a text, most also of a reference that they share, and a question."""
    rows = [
        {
            "id": f"r{index}",
            "instruction": "a red circle",
            "input_images": [] if index % 3 == 2 else [file(0)],
            "output_image": {"bytes": b"no picture", "path": None} if index in damaged else file(index + 1),
            "answer": None,
        }
        for index in range(count)
    ]
    question = {"id": "q", "instruction": "a red circle", "input_images": [file(99)], "output_image": None}
    return Dataset.from_list([*rows, {**question, "answer": "a red circle"}], features=FEATURES)


def entries(folder):
    return sorted(path.name for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_was_precomputed_is_not_encoded_and_changes_no_bit(processor, tmp_path, streaming, num_workers):
    rows = make_rows(6)
    builder, encoder = parts(processor, tmp_path, vae_dropout=0)
    ahead = rows.to_iterable_dataset(num_shards=2) if streaming else rows
    assert precompute(ahead, builder, encoder, num_workers=num_workers) == []
    assert len(entries(tmp_path)) == 7  # six to draw, one reference; what a question is about is not for the VAE

    batch = [(1, [rows[index] for index in range(len(rows))])]
    cached = PackCollator(builder)(batch)
    assert cached["pictures"] == []
    uncached_builder, uncached_encoder = parts(processor, vae_dropout=0)
    uncached = PackCollator(uncached_builder)(batch)
    assert len(uncached["pictures"]) == 10 and not uncached["latents"].any()
    uncached_encoder.fill(uncached)
    for name in cached.keys() - {"pictures"}:
        same = torch.equal if isinstance(cached[name], torch.Tensor) else lambda a, b: a == b
        assert same(cached[name], uncached[name]), name


def test_precompute_encodes_each_picture_once_and_shows_how_far_it_is(processor, tmp_path, capfd, monkeypatch):
    builder, encoder = parts(processor, tmp_path)
    encoded = []
    encode = encoder.vae.encode
    monkeypatch.setattr(encoder.vae, "encode", lambda pixels: (encoded.append(1), encode(pixels))[1])
    precompute(make_rows(4), builder, encoder)
    assert len(encoded) == 5
    precompute(make_rows(6), builder, encoder)
    assert len(encoded) == 7
    bar = capfd.readouterr().err
    assert "Encoding pictures: 100%" in bar and "7/7" in bar and "row/s" in bar and "encoded=2" in bar


def test_precompute_repairs_a_damaged_entry(processor, tmp_path, caplog):
    builder, encoder = parts(processor, tmp_path)
    precompute(make_rows(2), builder, encoder)
    path = next(tmp_path.rglob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    precompute(make_rows(2), builder, encoder)
    assert str(path) in caplog.text
    assert path.read_bytes() == content


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_picture_is_named_or_left_out(processor, tmp_path, num_workers):
    rows = make_rows(5, damaged=[1, 3])
    builder, encoder = parts(processor, tmp_path)
    with pytest.raises(SampleError, match="r1: output_image does not decode"):
        precompute(rows, builder, encoder, num_workers=num_workers)
    left_out = precompute(rows, builder, encoder, on_error="skip", num_workers=num_workers)
    assert [id for id, _ in left_out] == ["r1", "r3"]
    assert all("output_image does not decode" in reason for _, reason in left_out)
    assert len(entries(tmp_path)) == 4


def test_rows_over_the_budget_are_left_out_as_the_builder_says(processor, tmp_path):
    builder, encoder = parts(processor, tmp_path, oversize="skip")
    builder.max_tokens = 40
    left_out = precompute(make_rows(4), builder, encoder)
    assert [id for id, _ in left_out] == ["r0", "r1", "r3"]
    assert len(entries(tmp_path)) == 1


def test_precompute_needs_a_store(processor):
    with pytest.raises(ValueError, match="the LatentStore to fill"):
        precompute(make_rows(1), *parts(processor))


def precompute_slowly(processor, rows, folder):
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    tqdm.set_lock(threading.RLock())  # the one of before would stay taken if this process is killed
    PartialState._reset_state()
    PartialState(cpu=True)
    builder, encoder = parts(processor, folder)
    encode = encoder.vae.encode

    def slow(pixels):
        with open(folder / f"encoded-{os.getpid()}", "a") as log:
            log.write(f"{pixels.sum().item()}\n")
        time.sleep(0.1)
        return encode(pixels)

    encoder.vae.encode = slow
    precompute(rows, builder, encoder)


def test_a_killed_precompute_goes_on(processor, tmp_path):
    rows = make_rows(12)
    killed = multiprocessing.get_context("fork").Process(target=precompute_slowly, args=(processor, rows, tmp_path))
    killed.start()
    while len(entries(tmp_path)) < 4:
        assert killed.is_alive()
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert 4 <= len(before) < 13
    builder, encoder = parts(processor, tmp_path)
    precompute(rows, builder, encoder)
    assert len(entries(tmp_path)) == 13
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert all(encoder.store.get(name.removesuffix(".safetensors")) is not None for name in entries(tmp_path))


def one_of_two(rank, port, processor, rows, folder):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    precompute_slowly(processor, rows, folder)


def test_two_processes_share_the_work(processor, tmp_path, capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rows = make_rows(12)
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=one_of_two, args=(rank, port, processor, rows, tmp_path)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert capfd.readouterr().err.count(" 0/7 ") == 1  # half of 13 rows, in one bar
    logs = [path.read_text().split() for path in tmp_path.glob("encoded-*")]
    assert len(logs) == 2 and all(len(log) >= 5 for log in logs)
    assert len(set(sum(logs, []))) == len(sum(logs, [])) == 13 == len(entries(tmp_path))
