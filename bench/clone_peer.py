"""HyperCloning as its paper's formulas read, in plain torch and transformers: what bench/merge.py times growth against.

    python clone_peer.py FOLDER OUT FACTOR

The small model is loaded, a large one made as transformers makes one (at random), every weight tiled and divided into it (Samragh
et al. 2024, arXiv 2409.12903), the head untied, and the result saved. Run as a program of its own: it imports nothing of ours.
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main(source: str, out: str, factor: int) -> None:
    """Clone the model in `source`, in its own dtype, every width times `factor`."""
    small = LlamaForCausalLM.from_pretrained(source, torch_dtype="auto")
    values = small.config.to_dict()
    widths = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    values |= {key: values[key] * factor for key in widths} | {"tie_word_embeddings": False}
    large = LlamaForCausalLM(LlamaConfig(**values))
    torch.nn.Module.to(large, small.dtype)
    weights = small.state_dict()
    with torch.no_grad():
        for name, target in large.state_dict().items():
            source_weight = weights[name]
            if source_weight.dim() == 1:
                grown = source_weight.repeat(factor)
            elif "embed_tokens" in name:
                grown = source_weight.repeat(1, factor)
            elif "lm_head" in name:
                grown = source_weight.repeat(1, factor) / factor
            else:
                grown = source_weight.repeat(factor, factor) / factor
            target.copy_(grown)
    large.save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
