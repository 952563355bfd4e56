"""A checkpoint whose number would not be its model's is refused, in one sentence; one that is only unusual is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FileTokenizer
from tokenizers import models, trainers
from torch import Tensor, nn
from transformers import PreTrainedModel

import layerwise
from layerwise.cli import calibrate
from layerwise.evaluation import checked, model_check
from layerwise.evaluation.model_check import check_model, check_walk, main, walk_logits
from layerwise.evaluation.perplexity import evaluate
from layerwise.models.loading import load
from layerwise.models.streaming import LazyBlocks
from layerwise.models.structure import Blocks
from layerwise.runtime.errors import InputError
from layerwise.sources import checkpoint_files, fingerprint
from layerwise.sources.tokens import tokens_hash
from tests.support import tiny_configs
from tests.support.model_families import FAMILIES, VOCABULARY, build, tokens


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """The model with noise on all of its weights: at their random beginnings many parts of a model do nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny(family: str) -> PreTrainedModel:
    """A random model of a family of transformers that model_families does not have."""
    return tiny_configs.build(tiny_configs.family_config(family))


def saved(folder: Path, model: PreTrainedModel, **options: Any) -> dict[str, str]:
    """The config entry of a model."""
    model.save_pretrained(folder, **options)
    return {"path": str(folder)}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the one file of a model's weights."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **changed: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def plain_perplexity(model: Any, windows: Tensor) -> float:
    """By one forward pass of the library per window."""
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(w[None]).logits[0, :-1].double(), w[1:]) for w in windows]
    return float(torch.stack(losses).mean().exp())


def refusal(spec: dict[str, str]) -> str:
    """The one sentence that a model is refused with."""
    with pytest.raises(InputError) as refused:
        check_model(spec, tokens(2))
    told = str(refused.value)
    assert told.endswith(".") and "\n" not in told
    return told


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_is_the_model(tmp_path: Path, family: str):
    found = check_model(saved(tmp_path, build(family)), tokens(2))
    assert found["finite"] and found["reference"] == "from_pretrained" and found["window"] == 24
    assert found["walk_difference"] <= 1e-6 and found["causality_difference"] <= 1e-6


def test_a_model_that_does_not_fit_is_compared_with_its_own_forward_pass(tmp_path: Path, monkeypatch):
    spec = saved(tmp_path, build("mixtral"), max_shard_size="20KB")
    monkeypatch.setattr(model_check, "free_bytes", lambda device: 10)
    monkeypatch.setattr(model_check, "load", None)
    assert check_model(spec, tokens(2))["reference"] == "block by block"


# --------------------------------------------------------------------------------------------- more than its blocks


def test_blocks_that_are_passed_several_times_are_refused(tmp_path: Path):
    spec = saved(tmp_path, tiny("hrm_text"))
    told = "must call each block of model.L_module.layers once, in order. It calls them 6 times instead."
    assert refusal(spec) == f"HrmTextForCausalLM {told}"


def test_a_second_list_of_blocks_is_refused(tmp_path: Path):
    assert "must have one list of blocks" in refusal(saved(tmp_path, tiny("xlm")))


def test_states_of_four_dimensions_are_refused(tmp_path: Path):
    spec = saved(tmp_path, tiny("gemma3n_text"))
    assert refusal(spec)
    with pytest.raises(InputError, match=r"must pass hidden_states \[sequences, length, width\].* Got \[4, 1, 8, 32\]"):
        evaluate(LazyBlocks(spec), tokens(2))


def test_blocks_that_share_weights_are_refused():
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        InputError, match="must have weights of its own. Got shared ones instead: model.layers.0.mlp.up"
    ):
        check_walk(Blocks(model), Blocks(model), tokens(2))


def test_a_walk_through_another_model_is_known_by_its_logits():
    model, other = shaken(build("llama")), cast(Any, shaken(build("llama")))
    other.model.layers = nn.ModuleList(reversed(other.model.layers))
    with pytest.raises(
        InputError, match="must equal its blocks run one after another, but .* differ from the model's own by"
    ):
        check_walk(Blocks(other), Blocks(model), tokens(2))


def test_blocks_called_in_another_order_are_refused():
    model = shaken(build("llama"))
    blocks = Blocks(model)
    blocks.modules = nn.ModuleList(reversed(blocks.modules))
    with pytest.raises(InputError, match="once, in order. It calls them in another order instead"):
        check_walk(Blocks(model), blocks, tokens(2))


# ---------------------------------------------------------------------------------------------------------- causality


def test_a_model_that_sees_its_targets_is_refused(tmp_path: Path):
    told = refusal(saved(tmp_path, tiny("bert")))
    assert told.startswith("BertLMHeadModel is not causal: another last token changes the logits before it by ")


def test_a_leak_of_one_block_is_seen():
    model = cast(Any, shaken(build("llama")))
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, out: out + 0.01 * args[0].mean(1, keepdim=True))
    with pytest.raises(InputError, match="is not causal"):
        check_walk(Blocks(model), Blocks(model), tokens(2))


@pytest.mark.parametrize("masked", [-1e9, float("-inf")])
@pytest.mark.parametrize("leaks", [False, True])
def test_a_masked_logit_hides_no_leak(masked: float, leaks: bool):
    model = cast(Any, shaken(build("llama")))
    share = 0.01 if leaks else 0.0
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, out: out + share * args[0].mean(1, keepdim=True))
    model.lm_head.register_forward_hook(lambda _, args, out: out.index_fill(-1, torch.tensor([0, 7]), masked))
    with pytest.raises(InputError, match="is not causal") if leaks else nullcontext():
        found = check_walk(Blocks(model), Blocks(model), tokens(2))
        assert found["finite"] and found["walk_difference"] <= 1e-6


def test_a_prefix_that_sees_itself_is_seen():
    model = cast(Any, shaken(build("llama")))

    def leak(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        return torch.cat([out[:, :16] + out[:, :16].mean(1, keepdim=True), out[:, 16:]], 1)

    model.model.layers[0].mlp.register_forward_hook(leak)
    with pytest.raises(InputError, match="is not causal: another token 8 changes the logits before it"):
        check_walk(Blocks(model), Blocks(model), tokens(2))


def test_sequences_that_change_each_other_are_seen():
    model = cast(Any, shaken(build("llama")))
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: out - out.mean(0, keepdim=True))
    with pytest.raises(InputError, match="must equal its blocks run one after another"):
        check_walk(Blocks(model), Blocks(model), tokens(2))


def test_layers_behind_the_blocks_are_no_part_of_them():
    model = cast(Any, shaken(build("llama")))
    model.model.norm = nn.Sequential(model.model.norm, nn.Linear(32, 400), nn.Linear(400, 32))
    with pytest.raises(InputError, match="must have its linear layers in model.layers, which are compressed. It also"):
        check_walk(Blocks(model), Blocks(model), tokens(2))


def test_the_library_refuses_them_too():
    with pytest.raises(InputError, match="is not causal"):
        layerwise.compress_model(tiny("bert"), tokens(4), "2:4", "magnitude")


# ------------------------------------------------------------------------------------------------- tensors of the file


def test_a_head_of_its_own_stays_one_whatever_the_config_says(tmp_path: Path):
    model = shaken(build("llama"))
    spec = saved(tmp_path, model)
    set_config(tmp_path, tie_word_embeddings=True)
    right = plain_perplexity(model, tokens(3))
    assert evaluate(LazyBlocks(spec), tokens(3))["perplexity"] == pytest.approx(right, rel=1e-6)
    assert plain_perplexity(load(spec), tokens(3)) == pytest.approx(right, rel=1e-6)
    check_model(spec, tokens(2))


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_a_tied_head_is_tied_whichever_name_the_file_has(tmp_path: Path, kept: str):
    model = build("qwen3")
    spec, weight = saved(tmp_path, model), model.get_input_embeddings().get_parameter("weight").detach()

    def change(tensors: dict[str, Tensor]) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors.pop(name, None)
            if kept in (name, "both"):
                tensors[name] = weight.clone()

    rewrite(tmp_path, change)
    right = plain_perplexity(model, tokens(3))
    assert evaluate(LazyBlocks(spec), tokens(3))["perplexity"] == pytest.approx(right, rel=1e-6)


def test_tensors_that_the_model_does_not_take_are_named(tmp_path: Path):
    spec = saved(tmp_path, build("llama"))
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.0.adapter.weight": torch.ones(3, 3)}))
    for make in (LazyBlocks, load):
        with pytest.raises(InputError, match="hold 1 tensors that LlamaForCausalLM does not take: model.layers.0.adap"):
            make(spec)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(InputError, match="they belong to a quantised model, and one in floating point is needed"):
        LazyBlocks(spec)


def test_codes_are_no_weights(tmp_path: Path):
    spec = saved(tmp_path, build("llama"))
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: (50 * tensors[name]).to(torch.int8)}))
    with pytest.raises(InputError, match=f"must be in floating point. Got {name} of dtype I8"):
        checkpoint_files.check_weight_files("tiny", tmp_path)
    with pytest.raises(InputError, match=f"must be in floating point. Got {name} of dtype I8"):
        LazyBlocks(spec)


def test_codes_of_experts_are_no_weights(tmp_path: Path):
    spec = saved(tmp_path, build("gpt_oss"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    rewrite(tmp_path, lambda tensors: tensors.update({name: (50 * tensors[name]).to(torch.int8)}))
    with pytest.raises(InputError, match=f"must be in floating point. Got {name} of dtype I8"):
        LazyBlocks(spec)


@pytest.mark.parametrize("make", [LazyBlocks, load])
def test_a_buffer_of_the_files_is_a_weight(tmp_path: Path, make: Callable[[dict[str, str]], Any]):
    """The bias of DeepSeek V3's router decides which experts are run."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    spec = saved(tmp_path, build("deepseek_v3"))
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensors[name] * float("nan")}))
    with pytest.raises(InputError, match=f"must be finite. Got NaN or Inf in {name} instead"):
        blocks = make(spec)
        with blocks.open(1):
            pass
    rewrite(tmp_path, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(InputError, match=f"lack tensors of DeepseekV3ForCausalLM: {name}"):
        make(spec)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path):
    spec = saved(tmp_path, build("llama"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="must hold whole weights. Got an adapter for other weights instead"):
        LazyBlocks(spec)


def test_a_tensor_of_two_files_that_no_index_names_is_refused(tmp_path: Path):
    spec = saved(tmp_path, build("llama"), max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    files = list(found["weight_map"].values())
    name, file = next((name, file) for name, file in found["weight_map"].items() if files.count(file) > 1)
    other = next(path for path in found["weight_map"].values() if path != file)
    tensors = load_file(tmp_path / other) | {name: load_file(tmp_path / file)[name]}
    save_file(tensors, tmp_path / other, metadata={"format": "pt"})
    del found["weight_map"][name]
    index.write_text(json.dumps(found))
    with pytest.raises(InputError, match=f"must hold {name}, or its index must say which. Got it in model-"):
        LazyBlocks(spec)


@pytest.mark.parametrize("name", checkpoint_files.QUANTISED_FILES)
def test_a_quantisers_config_is_seen_before_any_job(tmp_path: Path, name: str):
    saved(tmp_path, build("llama"))
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=f"must be in floating point. Got a quantised one instead: .* has {name}"):
        checkpoint_files.check_weight_files("tiny", tmp_path)


def shards(folder: Path, **options: Any) -> tuple[dict[str, str], Path, dict[str, str]]:
    """Config entry, index file and weight_map of a model in several files."""
    spec = saved(folder, shaken(build("llama")), max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    return spec, index, json.loads(index.read_text())["weight_map"]


def test_the_index_says_which_file_a_tensor_is_read_from(tmp_path: Path):
    spec, index, where = shards(tmp_path)
    model = load(spec)
    name = "model.embed_tokens.weight"
    for other in sorted(set(where.values()) - {where[name]}):  # before and after it in the order of names
        tensors = load_file(tmp_path / other)
        save_file({**tensors, name: torch.zeros(VOCABULARY, 32)}, tmp_path / other, metadata={"format": "pt"})
    right = plain_perplexity(model, tokens(3))
    assert evaluate(LazyBlocks(spec), tokens(3))["perplexity"] == pytest.approx(right, rel=1e-6)
    assert plain_perplexity(load(spec), tokens(3)) == pytest.approx(right, rel=1e-6)
    check_model(spec, tokens(2))


def test_an_index_that_its_files_contradict_is_refused(tmp_path: Path):
    spec, index, where = shards(tmp_path)
    name = "model.embed_tokens.weight"
    other = next(file for file in where.values() if file != where[name])
    index.write_text(json.dumps({"metadata": {}, "weight_map": {**where, name: other}}))
    with pytest.raises(InputError, match=f"says that {name} is in {other}, which lacks it"):
        LazyBlocks(spec)


# ------------------------------------------------------------------------------------------- unusual, and accepted


def renamed(prefix: str, masks: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], None]:
    """The keys of the hub's first checkpoints: without the model's prefix, with the masks of the attention."""

    def change(tensors: dict[str, Tensor]) -> None:
        old = dict(tensors)
        tensors.clear()
        tensors |= {name.removeprefix(prefix): tensor for name, tensor in old.items()} | masks

    return change


MASK = torch.ones(64, 64).tril().view(1, 1, 64, 64)
VARIANTS = {
    "gpt2": ("transformer.", {f"h.{i}.attn.bias": MASK.clone() for i in range(2)}),
    "bloom": ("transformer.", {}),
    "opt": ("model.", {}),
    "gptj": ("", {f"transformer.h.{i}.attn.{key}": MASK.bool() for i in range(2) for key in ("bias",)}),
    "gpt_neox": ("", {f"gpt_neox.layers.{i}.attention.masked_bias": torch.tensor(-1e9) for i in range(2)}),
    "llama": ("", {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}),
    "deepseek_v3": (
        "",
        {
            "model.layers.61.eh_proj.weight": torch.ones(32, 64),
            "model.layers.61.shared_head.norm.weight": torch.ones(32),
        },
    ),
}


@pytest.mark.parametrize("family", VARIANTS)
def test_names_of_the_hub_are_accepted(tmp_path: Path, family: str):
    model = shaken(build(family))
    spec = saved(tmp_path, model)
    rewrite(tmp_path, renamed(*VARIANTS[family]))
    check_model(spec, tokens(2))
    right = plain_perplexity(model, tokens(3))
    assert evaluate(LazyBlocks(spec), tokens(3))["perplexity"] == pytest.approx(right, rel=1e-6)


def test_dtypes_may_differ_within_a_file(tmp_path: Path):
    spec = saved(tmp_path, shaken(build("olmo2")))
    rewrite(tmp_path, lambda ts: ts.update({key: t.bfloat16() for key, t in ts.items() if "norm" not in key}))
    set_config(tmp_path, dtype="float32")
    check_model(spec, tokens(2))
    right = plain_perplexity(load(spec), tokens(3))
    assert evaluate(LazyBlocks(spec), tokens(3))["perplexity"] == pytest.approx(right, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- the job


def test_the_job_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    spec = {**saved(tmp_path / "model", build("llama")), "name": "tiny", "dtype": "bfloat16"}
    drawn = tokens(2)
    metadata = {"info": json.dumps({"tokens_sha256": tokens_hash(drawn.numpy())})}
    save_file({"tokens": drawn}, tmp_path / "tokens.safetensors", metadata=metadata)
    (tmp_path / "model/tokenizer.json").write_text("{}")
    fingerprint.main(["--model", json.dumps(spec), "--out", str(tmp_path / "model.json")])
    names = {"fingerprint": "model.json", "tokens": "tokens.safetensors", "out": "found.json"}
    arguments = [part for key, name in names.items() for part in (f"--{key}", str(tmp_path / name))]
    main(["--model", json.dumps(spec), *arguments])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["finite"] and found["walk_difference"] <= 1e-6 and found["vocabulary"] == VOCABULARY


@pytest.mark.parametrize("generates, said", [(False, None), (True, "tasks that generate text, such as second")])
def test_the_job_asks_for_the_tokens_of_the_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generates: bool, said: str | None
):
    monkeypatch.chdir(tmp_path)
    spec = {**saved(tmp_path / "model", build("llama")), "name": "tiny", "dtype": "float32"}
    own = FileTokenizer(models.BPE())
    own.train_from_iterator(["words of a text"], trainers.BpeTrainer(special_tokens=["<s>"], show_progress=False))
    own.save(str(tmp_path / "model/tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(config))
    drawn = tokens(2)
    metadata = {"info": json.dumps({"tokens_sha256": tokens_hash(drawn.numpy())})}
    save_file({"tokens": drawn}, tmp_path / "tokens.safetensors", metadata=metadata)
    fingerprint.main(["--model", json.dumps(spec), "--out", str(tmp_path / "model.json")])
    for name, writes in (("first", False), ("second", generates)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"tasks": {name: {"generates": writes}}}))
    names = {"fingerprint": "model.json", "tokens": "tokens.safetensors", "out": "found.json"}
    arguments = [part for key, name in names.items() for part in (f"--{key}", str(tmp_path / name))]
    arguments += ["--tasks", str(tmp_path / "first.json"), str(tmp_path / "second.json")]
    with nullcontext() if said is None else pytest.raises(InputError, match=f"{said}. Got none instead"):
        main(["--model", json.dumps(spec), *arguments])
    assert (tmp_path / "found.json").exists() is (said is None)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """A function that gives the arguments of a job which calibrates a tiny model of a family."""
    monkeypatch.chdir(tmp_path)

    def arguments(family: str) -> list[str]:
        spec = {**saved(tmp_path / family, tiny(family)), "name": family, "dtype": "float32"}
        drawn = tokens(2)
        metadata = {"info": json.dumps({"tokens_sha256": tokens_hash(drawn.numpy())})}
        save_file({"tokens": drawn}, tmp_path / "tokens.safetensors", metadata=metadata)
        (tmp_path / f"{family}/tokenizer.json").write_text("{}")
        fingerprint.main(["--model", json.dumps(spec), "--out", f"{family}.json"])
        return ["--model", json.dumps(spec), "--fingerprint", f"{family}.json", "--tokens", "tokens.safetensors"]

    return arguments


def test_a_model_is_checked_once_by_the_same_code(job: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch):
    _, spec, _, own, _, drawn = job("llama")
    call = partial(checked.ensure_checked, json.loads(spec), Path(own), Path(drawn))
    found, runs = call(), list[str]()
    monkeypatch.setattr(model_check, "check_model", lambda *_: runs.append(checked.CODE) or found)
    assert call() == found and runs == []
    monkeypatch.setattr(checked, "CODE", "another")
    assert call() == call() == found and runs == ["another"]


def test_no_job_calibrates_a_model_that_does_not_pass(job: Callable[[str], list[str]], tmp_path: Path):
    """Whichever jobs have run before: the record of the rule check_model is no input of any."""
    with pytest.raises(InputError, match="is not causal"):
        calibrate.main([*job("bert"), "--out", "gram.json"])
    assert not (tmp_path / "gram.json").exists() and not list(tmp_path.rglob("passed/*"))


def test_the_walk_is_what_jobs_compute():
    model = build("llama")
    with torch.no_grad():
        torch.testing.assert_close(walk_logits(Blocks(model), tokens(2)), model(input_ids=tokens(2)).logits)
