"""What the trial of a model finds. Forms are expected from what is known of each architecture, not from what ours said.

tests/models/test_sweep.py holds every architecture to plain PEFT; here stand the single findings, and models made to trip it.
"""

from types import SimpleNamespace
from typing import Any

import architectures
import numpy as np
import pytest
import tiny
import torch
from architectures import ARCHITECTURES, ENCODER_DECODERS, VOCAB
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from fedlora.config import ModelConfig, TrainConfig
from fedlora.data.encoded import Encoded
from fedlora.errors import BadInput
from fedlora.models import peft, trial
from fedlora.models.load import Pretrained, from_config
from fedlora.models.packing import Form, Packing, Positions, Reads, Shared
from fedlora.models.slots import find_targets
from fedlora.models.trial import Findings, try_model
from fedlora.training.batched import Trainer
from fedlora.types import Model

CPU = torch.device("cpu")


def pretrained(name: str, **changes: Any) -> Pretrained:
    config = ARCHITECTURES[name].config()
    for key, value in changes.items():
        setattr(config, key, value)
    return from_config(config, None, 1)


def tried(model: Any, limit: int = 100, wanted: Any = "all-linear") -> Findings:
    return try_model(model, find_targets(model, wanted), limit, VOCAB, (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("bert", Form(Shared.PACKED, Packing(Reads.FIRST, Positions.FROM_ZERO))),
        ("roberta", Form(Shared.PACKED, Packing(Reads.FIRST, Positions.AFTER_PADDING))),  # positions count from the padding id on
        ("gpt2", Form(Shared.PACKED, Packing(Reads.LAST, Positions.FROM_ZERO))),
        ("mistral", Form(Shared.PACKED, Packing(Reads.LAST, Positions.FROM_ZERO))),
        ("gemma2", Form(Shared.PACKED, Packing(Reads.LAST, Positions.FROM_ZERO))),  # caps its attention scores
        ("deberta/absolute", Form(Shared.PADDED)),
        ("deberta-v2/shared", Form(Shared.PADDED, apart=True)),  # its query and key layers see a table of positions, too
        ("albert", Form(Shared.PADDED, split=False)),  # pools in its own way
        ("xlnet", Form(Shared.PADDED, left=True, split=False, apart=True)),  # reads position -1; rows go token by token
        ("longformer", Form(Shared.PADDED, split=False, apart=True)),  # rows go token by token
        ("fnet", Form(Shared.ONE_LENGTH)),  # mixes along the text, padding included
        ("convbert", Form(Shared.ONE_LENGTH)),  # convolves along it
    ],
)
def test_forms(name: str, form: Form) -> None:
    assert tried(pretrained(name).model).form == form


@pytest.mark.parametrize("most", [1 << 32, 0])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_is_no_difference(seed: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of half precision is what it is in full, also where it is too large to be cast as a whole, and left as it was."""
    monkeypatch.setattr(trial, "FULL_BYTES", most)
    model, tokenizer = architectures.causal("llama/wide", seed)
    targets = find_targets(model, "all-linear")
    wanted = try_model(model, targets, 64, len(tokenizer), tokens=True)
    assert (wanted.form.shared, wanted.form.apart) == (Shared.PACKED, False)
    model = model.to(torch.bfloat16)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with trial.in_full(model):
        assert next(model.parameters()).dtype is (torch.float32 if most else torch.bfloat16)
        assert try_model(model, targets, 64, len(tokenizer), tokens=True) == wanted
    after = model.state_dict()
    assert all(after[name].dtype == x.dtype and torch.equal(after[name], x) for name, x in before.items())
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in model.modules())


def test_a_short_table_is_found_and_its_model_padded() -> None:
    found = tried(pretrained("gpt_neo/short").model)
    assert found.form.shared is Shared.PADDED and found.limit == found.tried == 64
    assert any("above the 64 tokens" in note for note in found.notes)


@pytest.mark.parametrize(("name", "table"), [("bert", 70), ("roberta", 69), ("opt", 70), ("roberta", 19)])
def test_texts_are_cut_at_the_positions_that_there_are(name: str, table: int) -> None:
    """RoBERTa's positions begin after the padding id, so a table of 70 rows holds 69; OPT's has two rows more than it says."""
    rows = table + (name == "roberta")
    found = tried(pretrained(name, max_position_embeddings=rows).model, 90)
    assert found.limit == table


def test_beyond_what_was_tried_the_model_is_believed_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MOST", 40)
    found = tried(pretrained("llama", max_position_embeddings=90).model, 100)
    assert (found.limit, found.tried) == (90, 40)
    assert any("up to 90 tokens are allowed" in note and "up to 40" in note for note in found.notes)


def test_the_pack_that_is_tried_is_longer_than_the_longest_text_and_than_256(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[list[int]] = []
    before = trial.pack
    monkeypatch.setattr(trial, "pack", lambda ids, *rest: sizes.append([len(x) for x in ids]) or before(ids, *rest))
    for limit in (16, 100, 290):
        sizes.clear()
        tried(pretrained("bert").model, limit)
        packs = [each for each in sizes if len(each) > 1]
        assert packs and all(max(each) == limit and sum(each) > max(limit, 256) for each in packs)


def test_layers_that_take_no_part_are_left_out() -> None:
    """Luke's layers for entities are called for entities only; jamba reads dt_proj's weight without calling it; zamba's two copies
    of one block share their weights."""
    for name, lost, reason in (
        ("luke", "w2e_query", "not called"),
        ("gemma3", "vision", "not called"),
        ("zamba", "shared_transf", "shares its weight"),
    ):
        found = tried(pretrained(name).model)
        assert not any(lost in m for m in found.targets) and found.targets
        assert any(lost in note and reason in note for note in found.notes), found.notes


@pytest.mark.parametrize("name", ["phimoe", "qwen2_moe", "mixtral", "jetmoe", "hunyuan_v1_moe"])
def test_gates_of_mixtures_are_no_targets(name: str) -> None:
    found = tried(pretrained(name).model).targets
    assert found and not any(m.endswith((".gate", "_gate", ".wg")) or "router" in m for m in found)


def test_no_layer_at_all_is_one_line() -> None:
    model = pretrained("squeezebert").model
    with pytest.raises(BadInput, match=r"no linear layer in its blocks; name some of: transformer\.pooler\.dense"):
        find_targets(model, "all-linear")


@pytest.mark.parametrize("name", ["funnel", "canine"])
def test_a_model_that_cannot_take_short_texts_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match=r"does not take a text of \d tokens: .+"):
        tried(pretrained(name).model)


def test_a_model_that_cannot_be_differentiated_is_refused() -> None:
    own = pretrained("reformer")
    found = tried(own.model)
    with pytest.raises(BadInput, match="ReformerForSequenceClassification cannot be trained here"):
        peft.rehearse(own, found.targets, found.form)


def test_the_rehearsal_leaves_the_model_as_it_was() -> None:
    own = pretrained("roberta")
    found = tried(own.model)
    modules, values = dict(own.model.named_modules()), {n: p.clone() for n, p in own.model.named_parameters()}
    keys = set(own.model.__dict__)
    peft.rehearse(own, found.targets, found.form)
    assert dict(own.model.named_modules()) == modules and set(own.model.__dict__) == keys
    assert all(torch.equal(p, values[n]) and not p.requires_grad for n, p in own.model.named_parameters())


def test_what_peft_cannot_hold_is_left_out_of_all_linear_and_refused_by_name() -> None:
    """PEFT takes a dense gate_proj beside fused experts for the experts' own."""
    own = pretrained("deepseek_v3")
    found = tried(own.model)
    with pytest.raises(BadInput, match="PEFT cannot hold an adapter on these layers of DeepseekV3"):
        peft.rehearse(own, found.targets, found.form)
    held = peft.held_by_peft(own, found.targets, found.form)
    assert held and not any(m.endswith(("gate_proj", "up_proj", "down_proj")) for m in held)


def test_an_adapter_that_means_something_else_under_peft_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = pretrained("bert")
    found = tried(own.model)
    before = peft.stack
    monkeypatch.setattr(peft, "stack", lambda result: before(Model({"twice": result.slots["rehearsal"], **result.slots})))
    with pytest.raises(BadInput, match="gives other logits under PEFT"):
        peft.rehearse(own, found.targets, found.form)


# ---- models that misbehave as only some texts show ---------------------------------------------------------------------------


class Strange(nn.Module):
    """A classifier that reads the mean of a text's embeddings, with one oddity."""

    base_model_prefix = "body"

    def __init__(self, oddity: str) -> None:
        super().__init__()
        self.body = Embedded(oddity)
        self.score = nn.Linear(8, 3)
        self.config = SimpleNamespace(pad_token_id=0, vocab_size=VOCAB, num_labels=3, _attn_implementation="eager", use_cache=False)
        self.config.get_text_config = lambda: self.config

    @property
    def base_model(self) -> nn.Module:
        return self.body

    def get_input_embeddings(self) -> nn.Module:
        return self.body.words

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask)[0]
        weight = attention_mask[:, :, None].float()
        return SimpleNamespace(logits=self.score((hidden * weight).sum(1) / weight.sum(1)))


class Embedded(nn.Module):
    def __init__(self, oddity: str) -> None:
        super().__init__()
        self.oddity = oddity
        self.words = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        x = self.words(input_ids)
        if self.oddity == "crowd" and len(input_ids) > 1:  # as where experts have a capacity
            x = x - x.mean(dim=(0, 1))
        if self.oddity == "dice":
            x = x + torch.rand_like(x)
        if self.oddity == "long" and input_ids.shape[1] > 60:
            raise RuntimeError("a table of 60 rows\nand more")
        if self.oddity == "nan" and input_ids.shape[1] == 21:
            x = x / 0
        return BaseModelOutput(self.layers[0](x))


class Unmasked(Strange):
    """The same without a place for a mask."""

    def forward(self, input_ids: torch.Tensor) -> Any:
        return super().forward(input_ids, torch.ones_like(input_ids))


def strange(oddity: str) -> Strange:
    torch.manual_seed(0)
    return Strange(oddity).eval()


def test_where_neighbours_count_a_text_has_a_pass_of_its_own() -> None:
    assert tried(strange("none")).form == Form(Shared.PADDED)
    found = tried(strange("crowd"))
    assert found.form.shared is Shared.ONE_TEXT and "neighbours" in found.notes[0]


def test_a_model_without_a_mask_gets_none() -> None:
    torch.manual_seed(0)
    assert tried(Unmasked("none").eval()).form == Form(Shared.ONE_LENGTH, masked=False, split=False)


def test_a_model_that_answers_by_chance_is_refused() -> None:
    with pytest.raises(BadInput, match="another answer to the same text each time"):
        tried(strange("dice"))


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(BadInput, match="not finite for a text of 21 tokens"):
        tried(strange("nan"))


def test_the_longest_text_is_searched_for() -> None:
    found = tried(strange("long"))
    assert found.limit == 60 and found.form.shared is Shared.PADDED


# ---- what the form does --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "gpt2", "deberta-v2/shared", "albert", "xlnet", "fnet", "convbert", "opt/projected"]
)
def test_a_text_gives_what_it_gives_alone(name: str) -> None:
    """Against the plain model on each text alone; some texts have the padding token inside, or at their end."""
    own = pretrained(name)
    plain = pretrained(name).model
    trainer = Trainer(own, find_targets(own.model, "all-linear"), TrainConfig(), CPU, torch.float32, tiny.objective())
    rng = np.random.default_rng(1)
    ids = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (1, 9, 40, 2, 9, 70, 3)]
    ids[1][4], ids[4][-1], ids[2][0] = 0, 0, 0
    data = Encoded(tuple(ids), np.zeros(len(ids), dtype=np.int64), np.array([len(row) for row in ids]))
    with torch.no_grad():
        wanted = np.stack([plain(input_ids=torch.from_numpy(x.astype(np.int64))[None]).logits[0].numpy() for x in ids])
    np.testing.assert_allclose(tiny.logits(trainer, Model(), {}, data), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", sorted(ENCODER_DECODERS))
def test_encoder_decoders_are_refused_in_one_line(name: str, tmp_path: Any) -> None:
    ENCODER_DECODERS[name].config().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="is an encoder-decoder; an encoder or a decoder is needed") as error:
        tiny.load_model(ModelConfig(source=str(tmp_path)), tiny.CLASSES, 0)
    assert "\n" not in str(error.value)
