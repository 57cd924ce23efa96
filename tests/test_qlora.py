"""QLoRA with bitsandbytes' CPU build: the hooked model has the dequantised weights and the live adapter's effect."""

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zoo
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from safety_lens.activations import capture
from safety_lens.artifacts import fingerprint
from safety_lens.data import Encoded
from safety_lens.folding import LoraFolder, Shadow
from safety_lens.models import hooks_at, load_model

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("bitsandbytes") is None,
        reason="bitsandbytes is optional: pip install 'safety-lens-tl[quant]'",
    ),
    pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes"),
    pytest.mark.filterwarnings("ignore:.*copy of dequantize:UserWarning"),
]
FORMATS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("llama")
    zoo.make("llama").save_pretrained(place)
    return place


def push(live: PeftModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in live.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))


def quantised(place: Path, form: str, config: object) -> PeftModel:
    """A model in training mode: on a CPU, bitsandbytes then multiplies with the dequantised weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes comments on kernels that are not installed
        hf = AutoModelForCausalLM.from_pretrained(
            place, quantization_config=BitsAndBytesConfig(**FORMATS[form]), dtype=torch.float32
        )
        live = get_peft_model(hf, config).train()
    push(live, 1)
    return live


def gap(model: torch.nn.Module, live: torch.nn.Module) -> float:
    return float((zoo.hooked_logits(model, zoo.ragged()) - zoo.hf_logits(live, zoo.ragged())).abs().max())


@pytest.mark.parametrize("form", FORMATS)
def test_quantised_bases_are_dequantised_exactly_and_the_adapter_follows(form: str, folder: Path) -> None:
    live = quantised(folder, form, LoraConfig(r=4, target_modules=LINEAR))
    packed = {name: p.detach().clone() for name, p in live.named_parameters()}
    model = load_model(live)
    hooked = LoraFolder(model, live)
    assert gap(model, live) <= 2e-4
    assert all(torch.equal(p, packed[name]) for name, p in live.named_parameters())
    push(live, 2)
    stale = gap(model, live)
    hooked.fold()
    assert stale > 0.1
    assert gap(model, live) <= 2e-4
    lost = zoo.hooked_logits(model, zoo.ragged()) - zoo.hf_logits(zoo.make("llama"), zoo.ragged())
    assert lost.abs().max() > 0.1  # few bits are another model than full precision, which is not what is compared


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("config", [IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "vera", "dora"])
def test_other_adapters_on_quantised_bases_are_merged_without_rounding_again(
    form: str, config: object, folder: Path
) -> None:
    if config == "dora" and form == "int8":
        pytest.skip("peft's own forward of DoRA on an int8 base fails with bitsandbytes on the CPU")
    made = {
        "vera": VeraConfig(r=4, target_modules=["q_proj"]),
        "dora": LoraConfig(r=4, use_dora=True, target_modules=LINEAR),
    }
    live = quantised(folder, form, made.get(config, config) if isinstance(config, str) else config)
    model = load_model(live)
    LoraFolder(model, live).fold()
    assert gap(model, live) <= 2e-4


@pytest.mark.parametrize("form", FORMATS)
def test_a_streamed_model_dequantises_one_block_at_a_time(form: str, folder: Path) -> None:
    live = quantised(folder, form, LoraConfig(r=4, target_modules=LINEAR))
    streamed, whole = load_model(live, stream=True), load_model(live)
    hooked = LoraFolder(streamed, live)
    push(live, 2)
    hooked.fold()
    assert gap(streamed, live) <= 2e-4
    LoraFolder(whole, live)
    assert fingerprint(streamed)["weights_sha256"] == fingerprint(whole)["weights_sha256"]
    assert Shadow(live, streamed=True).owned_bytes * 4 == Shadow(live).owned_bytes
    rows = [Encoded(tuple(range(4, 9 + i)), "", None, None) for i in range(6)]
    hooks = hooks_at(whole)
    one, all_ = (capture(model, rows, hooks).acts for model in (streamed, whole))
    assert all(torch.equal(one[hook], all_[hook]) for hook in hooks)


@pytest.mark.parametrize("form", ["nf4", "nf4_double"])
def test_weights_that_an_evaluation_on_the_cpu_repacked_can_still_be_read(form: str, folder: Path) -> None:
    live = quantised(folder, form, LoraConfig(r=4, target_modules=LINEAR))
    model = load_model(live)
    hooked = LoraFolder(model, live)
    before = zoo.hooked_logits(model, zoo.ragged())
    live.eval()
    zoo.hf_logits(live, zoo.ragged())
    state = live.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        pytest.skip("this processor has no AVX-512 bfloat16, so bitsandbytes does not repack")
    hooked.fold()
    after = zoo.hooked_logits(model, zoo.ragged())
    spread = float(before.std())
    assert 0 < float((after - before).abs().max()) < 0.2 * spread  # its block scales are bfloat16 from then on
    assert float((after - zoo.hf_logits(live, zoo.ragged())).abs().max()) < 0.2 * spread
