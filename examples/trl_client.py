"""A script with trl's SFTTrainer whose trainers join a federation: three lines are added to it, marked below.

pip install fedlora trl
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import fedlora  # added

WORDS = ["[PAD]", "[UNK]", "[EOS]", "the", "dose", "of", "is", "aspirin", "ibuprofen", "one", "two", "three", "tablets", "a", "day"]


def tiny_model() -> LlamaForCausalLM:
    """A language model with random weights, so that this runs anywhere; yours comes by from_pretrained."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=2, bos_token_id=None, **sizes))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")


def hospital(texts: list[str], folder: Path) -> SFTTrainer:
    """What stands in the script of each hospital."""
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        learning_rate=2e-3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    return SFTTrainer(
        model=tiny_model(),
        args=args,
        train_dataset=Dataset.from_dict({"text": texts}),
        eval_dataset=Dataset.from_dict({"text": ["the dose of aspirin is two tablets a day"]}),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp())
    north = hospital(["the dose of aspirin is one a day", "the dose of aspirin is two a day"] * 3, place / "north")
    south = hospital(["the dose of ibuprofen is three tablets a day"] * 4, place / "south")
    clients = [fedlora.client(north, "north"), fedlora.client(south, "south")]  # added
    run = fedlora.run(data=clients, method="fedit", rounds=2, progress=False)  # added, in the place of north.train()
    print(run)
    print(run.save_adapter(place / "adapter"), "holds what both have learned; so do north.model and south.model")
