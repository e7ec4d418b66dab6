"""A tiny T5 encoder and AutoencoderKL with random weights, saved as downloaded ones are."""

from pathlib import Path

import torch

from ecdit.data.torchvision_guard import hide_broken_torchvision

hide_broken_torchvision()

WIDTH, CHANNELS, FACTOR = 32, 4, 8


def make_text_encoder(folder: Path) -> Path:
    """A two-layer T5 with a tokenizer that knows some words and ends a caption with </s>, as T5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", "a", "the", "of", "in", "on", "with", "picture", "photo", "man", "woman"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def make_autoencoder(folder: Path) -> Path:
    """An AutoencoderKL with the factor of 8 and the 4 channels of Stable Diffusion's."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
    ).save_pretrained(folder)
    return folder


def make_clip(folder: Path) -> Path:
    """A two-layer CLIP text encoder with 16 places, and the same words."""
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    make_text_encoder(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, eos_token_id=1, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder)
    return folder


def make_t5gemma(folder: Path) -> Path:
    """A two-layer T5Gemma encoder, and the same words."""
    from transformers import PreTrainedTokenizerFast, T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

    make_text_encoder(folder)
    words = len(PreTrainedTokenizerFast.from_pretrained(folder))
    module = {
        "vocab_size": words, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16,
    }  # fmt: skip
    encoder, decoder = T5GemmaModuleConfig(**module), T5GemmaModuleConfig(**module)
    config = T5GemmaConfig(encoder=encoder, decoder=decoder, vocab_size=words, is_encoder_decoder=False)
    torch.manual_seed(0)
    T5GemmaEncoderModel(config).save_pretrained(folder)
    return folder
