"""The reference's log-odds: right, the same from every order of rows and any processes, reused only where they are."""

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import children
import pytest
import torch
from preference_rows import PAIRS, SINGLES
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bnf_core import token_log_odds
from bnf_train.__main__ import main
from bnf_train.data import Collator, Response, Row
from bnf_train.errors import UsageError
from bnf_train.model.head import attach_log_odds_head
from bnf_train.training import reference_cache
from bnf_train.training.distributed import compile_layers
from bnf_train.training.reference_cache import add_ref_log_odds, check_same_tokens

CPU = torch.device("cpu")
VOCAB = 48


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So that two processes and one add up in the same order; and faster on models this small."""
    threads, precision = torch.get_num_threads(), torch.backends.mkldnn.matmul.fp32_precision
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.backends.mkldnn.matmul.fp32_precision = precision


def tiny_model(seed: int = 0, attention: str = "sdpa", **options: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model: Any = LlamaForCausalLM._from_config(
        LlamaConfig(**sizes | {"vocab_size": VOCAB, "initializer_range": 0.3} | options), attn_implementation=attention
    )
    attach_log_odds_head(model)
    return model


def some_rows(count: int = 12, seed: int = 0, longest: int = 40) -> list[Row]:
    """Pairs and single responses of very different lengths."""
    draw = random.Random(seed)

    def response(preferred: bool) -> Response:
        prompt, tokens = draw.randint(1, longest // 2), draw.randint(1, longest // 2)
        return Response([draw.randrange(VOCAB) for _ in range(prompt + tokens)], prompt, preferred)

    return [Row("", [response(True), response(False)][: 1 + i % 3], i) for i in range(1, count + 1)]


def fill(rows: list[Row], cache: Path | None, model: Any = None, **changes: Any) -> list[str]:
    """`add_ref_log_odds` with defaults; what it said."""
    said: list[str] = []
    given: dict[str, Any] = {"collator": Collator(0), "device": CPU, "autocast": None, "batch_size": 3, "progress": False}
    add_ref_log_odds(model or tiny_model(), rows, cache=cache, say=said.append, **given | changes)
    return said


def values(rows: list[Row]) -> list[Tensor]:
    found = [r.ref_log_odds for row in rows for r in row.responses]
    assert all(v is not None for v in found)
    return [v for v in found if v is not None]


def files(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


@contextmanager
def counted_passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Collated batches: there is no forward pass without one."""
    made: list[int] = []
    collate = Collator.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Collator, "__call__", lambda self, rows: (made.append(len(rows)), collate(self, rows))[1])
        yield made


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_values_are_those_of_each_response_alone(packed: bool, batch_size: int) -> None:
    rows, model = some_rows(), tiny_model()
    fill(rows, None, model, collator=Collator(0, packed), batch_size=batch_size)
    for row in rows:
        for r in row.responses:
            ids = torch.tensor([r.input_ids])
            with torch.no_grad():
                expected, _ = token_log_odds(model(input_ids=ids[:, :-1]).logits, ids[:, 1:])
            assert r.ref_log_odds is not None
            torch.testing.assert_close(r.ref_log_odds, expected[0, r.prompt_length - 1 :], rtol=1e-4, atol=1e-4)


def test_little_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some_rows(200)
    positions = []
    collate = Collator.__call__

    def watched(self: Collator, batch_rows: Any) -> Any:
        batch = collate(self, batch_rows)
        positions.append(batch["input_ids"].numel())
        return batch

    monkeypatch.setattr(Collator, "__call__", watched)
    fill(rows, None, batch_size=8)
    longest = max(len(r.input_ids) for row in rows for r in row.responses)
    assert max(positions) <= 8 * longest
    assert sum(positions) < 1.1 * sum(len(r.input_ids) for row in rows for r in row.responses)


def test_the_second_time_nothing_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = some_rows(), some_rows()
    with counted_passes(monkeypatch) as passes:
        assert not fill(first, tmp_path)
        assert passes
        passes.clear()
        (sentence,) = fill(again, tmp_path)
        assert not passes
    assert "reused" in sentence
    assert len(files(tmp_path)) == 1
    assert all(torch.equal(a, b) for a, b in zip(values(first), values(again), strict=True))


def test_without_a_cache_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(some_rows(), None)
    assert not list(tmp_path.iterdir())


def test_the_order_of_rows_and_their_labels_play_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some_rows()
    fill(rows, tmp_path / "kept")
    (kept,) = files(tmp_path / "kept")
    shuffled = some_rows()
    random.Random(1).shuffle(shuffled)
    for row in shuffled:
        row.responses.reverse()
        for r in row.responses:
            r.preferred = not r.preferred
    fill(shuffled, tmp_path / "anew")
    (anew,) = files(tmp_path / "anew")
    assert (kept.name, kept.read_bytes()) == (anew.name, anew.read_bytes())
    back = {row.number: row for row in shuffled}
    for row in rows:
        for a, b in zip(row.responses, reversed(back[row.number].responses), strict=True):
            assert torch.equal(a.ref_log_odds, b.ref_log_odds)  # type: ignore[arg-type]


def test_responses_that_stand_there_twice_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with counted_passes(monkeypatch) as passes:
        rows = some_rows() + some_rows()
        fill(rows, None)
    assert sum(passes) == sum(len(row.responses) for row in rows) // 2
    half = len(values(rows)) // 2
    assert all(torch.equal(a, b) for a, b in zip(values(rows)[:half], values(rows)[half:], strict=True))


def moved_boundary(rows: list[Row]) -> list[Row]:
    """The same token ids, one prompt longer by a token."""
    response = next(r for row in rows for r in row.responses if r.tokens > 1)
    response.prompt_length += 1
    return rows


def other_token(rows: list[Row]) -> list[Row]:
    ids = rows[3].responses[0].input_ids
    ids[0] = (ids[0] + 1) % VOCAB
    return rows


def one_weight_moved() -> Any:
    model = tiny_model()
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[0, 0] = weight[0, 0].nextafter(torch.tensor(9.0))
    return model


def versions(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "__version__", "0.0.0")


DIFFERENCES: dict[str, Callable[[pytest.MonkeyPatch], dict[str, Any]]] = {
    "weights": lambda _: {"model": one_weight_moved()},
    "dtype": lambda _: {"model": tiny_model().bfloat16()},
    "config": lambda _: {"model": tiny_model(rms_norm_eps=1e-4)},
    "attention": lambda _: {"model": tiny_model(attention="eager")},
    "token_ids": lambda _: {"rows": other_token(some_rows())},
    "token_ids, boundary": lambda _: {"rows": moved_boundary(some_rows())},
    "token_ids, fewer rows": lambda _: {"rows": some_rows()[:-1]},
    "template": lambda _: {"template": "{{ messages }}"},
    "autocast": lambda _: {"autocast": torch.bfloat16},
    "packed": lambda _: {"collator": Collator(0, True)},
    "packed, prompts shared": lambda _: {"collator": Collator(0, True, share_prompts=True)},
    "float32_products": lambda _: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16") or {},
    "torch": lambda m: versions(torch, m) or {},
    "transformers": lambda m: versions(reference_cache.transformers, m) or {},
    "bnf-align": lambda m: versions(reference_cache.bnf_core, m) or {},
    "architecture": lambda _: {"model": other_class()},
    "compiled": lambda _: {"model": compiled()},
}


def compiled() -> Any:
    model = tiny_model()
    compile_layers(model, "eager", None)
    return model


def other_class() -> Any:
    model = tiny_model()
    model.__class__ = type("AnotherLlama", (LlamaForCausalLM,), {})
    return model


@pytest.mark.parametrize("what", DIFFERENCES)
def test_what_differs_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    fill(some_rows(), tmp_path)
    (first,) = files(tmp_path)
    before = first.read_bytes()
    changes = DIFFERENCES[what](monkeypatch)
    rows = changes.pop("rows", None) or some_rows()
    with counted_passes(monkeypatch) as passes:
        assert not fill(rows, tmp_path, **changes)  # neither reused nor found damaged
    assert passes
    assert first.read_bytes() == before
    (second,) = set(files(tmp_path)) - {first}
    old, new = (manifest(path) for path in (first, second))
    different = {key for key in old if old[key] != new[key]}
    assert what.split(",")[0] in different
    assert different <= {what.split(",")[0], "weights", "config"} if what in ("dtype",) else len(different) == 1


def manifest(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["manifest"])
        del found["checksum"]  # of the values
        return found


def test_every_entry_of_the_manifest_is_tried(tmp_path: Path) -> None:
    fill(some_rows(), tmp_path)
    entries = manifest(*files(tmp_path)).keys()
    assert entries - {what.split(",")[0] for what in DIFFERENCES} == {"device", "head"}  # one of each here


def test_where_the_model_lies_plays_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "there"):
        folder = tmp_path / name
        tiny_model().save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        attach_log_odds_head(model)
        fill(some_rows(), tmp_path / "cache", model)
    assert len(files(tmp_path / "cache")) == 1


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, list[Tensor]]:
    """A folder with one whole file, its bytes, and the values."""
    folder, rows = tmp_path_factory.mktemp("whole"), some_rows(4)
    fill(rows, folder)
    (path,) = files(folder)
    return folder, path.read_bytes(), values(rows)


def test_a_flipped_bit_anywhere_is_found(whole: tuple[Path, bytes, list[Tensor]], tmp_path: Path) -> None:
    folder, content, _ = whole
    (path,) = files(folder)
    with safe_open(path, "pt") as file:
        good = file.get_tensor("log_odds")
    expected, copy = manifest(path), tmp_path / path.name
    for place in range(-1, len(content)):  # at first, none
        flipped = bytearray(content)
        if place >= 0:
            flipped[place] ^= 1 << place % 8
        copy.write_bytes(flipped)
        said: list[str] = []
        found = reference_cache._read(copy, expected, len(good), said.append)
        assert found is None if place >= 0 else found is not None and torch.equal(found, good), place
        assert len(said) == (place >= 0), (place, said)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_found_and_rebuilt(whole: tuple[Path, bytes, list[Tensor]], tmp_path: Path, share: float) -> None:
    self_heals(whole, tmp_path, lambda content: content[: int(share * len(content))])


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "header": lambda b: b[:40] + bytes([b[40] ^ 4]) + b[41:],
    "header length": lambda b: b"\xff" * 8 + b[8:],
    "first value": lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :],
    "last byte": lambda b: b[:-1] + bytes([b[-1] ^ 128]),
    "one byte more": lambda b: b + b"\0",
    "zeros": lambda b: bytes(len(b)),
    "text": lambda _: b"not safetensors at all",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_found_and_rebuilt(whole: tuple[Path, bytes, list[Tensor]], tmp_path: Path, damage: str) -> None:
    self_heals(whole, tmp_path, DAMAGE[damage])


def self_heals(whole: tuple[Path, bytes, list[Tensor]], cache: Path, damage: Callable[[bytes], bytes]) -> None:
    folder, content, expected = whole
    cache = cache / "cache"
    cache.mkdir()
    copy = cache / files(folder)[0].name
    copy.write_bytes(damage(content))
    rows = some_rows(4)
    (sentence,) = fill(rows, cache)
    assert "warning" in sentence
    assert str(copy) in sentence
    assert all(torch.equal(a, b) for a, b in zip(values(rows), expected, strict=True))
    assert copy.read_bytes() == content
    assert files(cache) == [copy]
    assert "reused" in fill(some_rows(4), cache)[0]


def test_another_file_under_this_name_is_not_taken(tmp_path: Path) -> None:
    fill(some_rows(), tmp_path)
    (mine,) = files(tmp_path)
    fill(some_rows(seed=1), tmp_path)
    (other,) = set(files(tmp_path)) - {mine}
    os.replace(other, mine)
    (sentence,) = fill(some_rows(), tmp_path)
    assert "warning" in sentence


# --- a folder that cannot be written -----------------------------------------------------------------------------------


def test_a_full_disk_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference_cache.os, "fsync", full)
    rows, expected = some_rows(), some_rows()
    (sentence,) = fill(rows, tmp_path / "cache")
    assert "warning: --reference_cache" in sentence
    assert "no space left on device" in sentence
    assert not files(tmp_path / "cache")  # no part of a file either
    fill(expected, None)
    assert all(torch.equal(a, b) for a, b in zip(values(rows), values(expected), strict=True))


def test_a_really_full_device_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    real = open
    monkeypatch.setattr(reference_cache, "open", lambda path, mode: real("/dev/full", "wb"), raising=False)
    rows = some_rows()
    (sentence,) = fill(rows, tmp_path / "cache")
    assert "no space left on device" in sentence
    assert values(rows)


def test_a_folder_that_is_a_file_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for cache in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        rows = some_rows()
        (sentence,) = fill(rows, cache)
        assert f"--reference_cache {cache}" in sentence
        assert values(rows)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_killed_writer_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reference_cache.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            fill(some_rows(), tmp_path)
    assert not files(tmp_path)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_no_rows_and_no_responses(tmp_path: Path) -> None:
    for rows in ([], [Row("", [])]):
        fill(rows, tmp_path)
        assert "reused" in fill(rows, tmp_path)[0]


def test_a_reference_that_gives_nan_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    rows = some_rows(3)
    rows[1].responses[0].input_ids[0] = 7
    for row in rows[::2]:
        for r in row.responses:
            r.input_ids = [i if i != 7 else 8 for i in r.input_ids]
    with pytest.raises(UsageError, match=r"^row 2: .*NaN"):
        fill(rows, tmp_path, model)
    assert not files(tmp_path)


def test_the_mode_of_the_model_stays(tmp_path: Path) -> None:
    model = tiny_model(attention_dropout=0.5).train()
    first, second = some_rows(), some_rows()
    fill(first, None, model)
    fill(second, None, model)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(values(first), values(second), strict=True))  # no dropout


def test_reuse_computes_nothing_and_goes_over_each_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 pairs of 2 x 200 tokens: what is left to do grows with their bytes. The pass itself is replaced by numbers."""
    draw, ids = random.Random(0), list(range(VOCAB)) * 9
    starts = ((draw.randrange(200), draw.randrange(VOCAB)) for _ in range(4000))
    responses = [Response([n, *divmod(i, 200), *ids[s : s + 197]], 80, True) for i, (s, n) in enumerate(starts)]
    rows, model = [Row("", [a, b]) for a, b in zip(responses[::2], responses[1::2], strict=True)], tiny_model()
    passed: list[int] = []
    digested: list[int] = []
    digest = reference_cache._digest

    def invented(model: Any, responses: list[Response], *_: Any) -> Tensor:
        passed.append(len(responses))
        return torch.randn(sum(r.tokens for r in responses))

    def counted(parts: Any) -> str:
        return digest(digested.append(memoryview(part).nbytes) or part for part in parts)

    monkeypatch.setattr(reference_cache, "_reference_pass", invented)
    fill(rows, tmp_path, model)
    before = values(rows)
    monkeypatch.setattr(reference_cache, "_digest", counted)
    with counted_passes(monkeypatch) as collated:
        (sentence,) = fill(rows, tmp_path, model)
    assert "reused" in sentence
    assert passed == [4000]  # by the first run, none by the second
    assert not collated
    weights = sum(p.nbytes for p in model.parameters())
    assert sum(digested) == pytest.approx(4 * sum(map(len, before)) + 4 * 202 * 4000 + weights, rel=0.01)
    assert all(torch.equal(a, b) for a, b in zip(values(rows), before, strict=True))


def test_a_reference_with_other_tokens_is_refused(model_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    check_same_tokens(str(model_folder), tokenizer)
    other = tmp_path / "other"
    LlamaConfig(vocab_size=8).save_pretrained(other)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(UsageError, match=r"^--ref_model .*another vocabulary"):
        check_same_tokens(str(model_folder), tokenizer)
    with pytest.raises(UsageError, match=r"^--ref_model \./nothing"):
        check_same_tokens("./nothing", tokenizer)


TWO_PROCESSES = """
import sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from test_reference_cache import fill, some_rows, values

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2,
                        timeout=timedelta(minutes=10))
cache = folder / "cache" if rank == 0 else folder / "not there" / "for the others"  # a disk of the first machine only
for said in ([], ["reused"]):
    rows = some_rows()
    heard = fill(rows, cache)
    assert len(heard) == len(said if rank == 0 else []), heard
    assert torch.stack([v.sum() for v in values(rows)]).isfinite().all()
assert not (folder / "not there").exists()
(folder / f"sums-{rank}").write_text(repr([v.tolist() for v in values(rows)]))
dist.destroy_process_group()
"""


def test_two_processes_write_the_file_of_one(tmp_path: Path) -> None:
    children.together([("-c", TWO_PROCESSES, str(rank), str(tmp_path)) for rank in range(2)], OMP_NUM_THREADS="1")
    rows = some_rows()
    fill(rows, tmp_path / "one")
    (one,), (two,) = files(tmp_path / "one"), files(tmp_path / "cache")
    assert (one.name, one.read_bytes()) == (two.name, two.read_bytes())
    expected = repr([v.tolist() for v in values(rows)])
    assert [(tmp_path / f"sums-{rank}").read_text() for rank in range(2)] == [expected] * 2


def run(folder: Path, rows: Path, output: Path, *flags: str) -> int:
    return main(
        [
            *("--model", str(folder), "--dataset", str(rows), "--output_dir", str(output), "--disable_tqdm", "true"),
            *("--max_steps", "1", "--max_length", "128", "--save_strategy", "no", "--bf16", "false", "--use_cpu", "true"),
            *("--batch_size", "4", *flags),
        ]
    )


def test_from_the_command_line(
    model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, cache = write_rows(PAIRS + SINGLES), tmp_path / "cache"
    flags = ["--reference-cache", str(cache)]
    assert run(model_folder, rows, tmp_path / "a", *flags) == 0
    assert "reused" not in capsys.readouterr().out
    assert run(model_folder, rows, tmp_path / "b", *flags, "--seed", "7") == 0  # other rows held out, other order
    assert "reused" in capsys.readouterr().out
    assert run(model_folder, rows, tmp_path / "c", *flags, "--no_reference_cache") == 0
    assert "reused" not in capsys.readouterr().out
    assert len(files(cache)) == 1
    # the trained model as reference of the one that it was
    assert run(model_folder, rows, tmp_path / "d", *flags, "--ref_model", str(tmp_path / "a"), "--learning_rate", "1e-3") == 0
    assert len(files(cache)) == 2
    assert run(model_folder, rows, tmp_path / "e", "--ref_model", str(tmp_path / "nothing")) == 2
    assert "--ref_model" in capsys.readouterr().err


def test_the_other_reference_is_freed_before_the_policy_is_loaded(
    model_folder: Path, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    from bnf_train import run as run_module

    alive: list[int] = []
    models: list[weakref.ref[Any]] = []
    real = run_module.load_model

    def watched(*args: Any, **kwargs: Any) -> Any:
        alive.append(sum(model() is not None for model in models))
        model = real(*args, **kwargs)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(run_module, "load_model", watched)
    assert run(model_folder, write_rows(PAIRS), tmp_path / "out", "--ref_model", str(model_folder)) == 0
    assert alive == [0, 0]
