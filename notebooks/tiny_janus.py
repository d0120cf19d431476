"""A random Janus-Pro of a few hundred kilobytes in the published format, to try everything where the weights are not.

    python notebooks/tiny_janus.py DIR

writes every file that gvu_jax.convert reads of DeepSeek's folders. What the model draws is noise, and it reads the
words of the shapes world.
"""
import json
import sys
from pathlib import Path

import jax
import numpy as np

from gvu_jax import tensor_files
from gvu_jax.families.janus import ASSISTANT, BEGIN, BOS, END, PAD, PICTURE, USER, Janus
from gvu_jax.models import llama, siglip, torch_keys, vq
from gvu_jax.shapes.tokenizer import UNKNOWN, of_words

END_OF_TEXT = "<｜end▁of▁sentence｜>"
CODES, PATCH, SIDE = 32, 16, 3                     # of VQ-16; pixels of a code or a patch; patches along a picture


def write(folder):
    """Writes the folder, and returns its path."""
    folder, umm = Path(folder), tiny()
    folder.mkdir(parents=True, exist_ok=True)
    D, tower = umm.ar.hidden_size, umm.vision
    part = lambda **params: {"params": params}
    aligner = dict(depth=2, projector_type="mlp_gelu", n_embed=D)
    write_json(folder / "config.json", {
        "model_type": "multi_modality", "architectures": ["MultiModalityCausalLM"],
        "language_config": {"model_type": "llama"} | {name: getattr(umm.ar, name) for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads")},
        "vision_config": part(model_name="siglip_large_patch16_384", select_feature="same", select_layer=-1,
                              image_size=PATCH * SIDE, width=tower.width, layers=tower.layers, heads=tower.heads,
                              patch_size=PATCH, mlp_ratio=tower.mlp_hidden // tower.width),
        "gen_vision_config": {"cls": "VQ-16"} | part(
            image_token_size=CODES, n_embed=umm.vq.codebook_dim, ch=umm.vq.channels, ch_mult=umm.vq.multipliers,
            num_res_blocks=umm.vq.res_blocks, z_channels=umm.vq.z_channels),
        "gen_head_config": part(image_token_embed=umm.ar.image_head_width, image_token_size=CODES, n_embed=D),
        "aligner_config": part(input_dim=tower.width, **aligner),
        "gen_aligner_config": part(input_dim=umm.vq.codebook_dim, **aligner)})
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "VLMImageProcessor", "image_size": PATCH * SIDE, "min_size": 14,
        "background_color": [127] * 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255,
        "do_normalize": True})
    write_json(folder / "processor_config.json", {
        "add_special_token": False, "sft_format": "deepseek", "image_tag": PICTURE, "num_image_tokens": SIDE ** 2})
    umm.tokenizer.save_pretrained(folder)
    params = jax.device_get(jax.jit(umm.init)(jax.random.key(0)))
    tensors = torch_keys.to_torch(params, {part: room.RULES["published"] for part, room in (
        ("ar", llama), ("vision", siglip), ("vq", vq))})
    specs = {name: tensor_files.Spec(np.dtype(array.dtype), array.shape, 0) for name, array in tensors.items()}
    tensor_files.write_file(folder / "model.safetensors", tensor_files.safetensors_header(specs), tensors.__getitem__)
    return folder


def tiny():
    """The sizes: each part as small as its architecture allows."""
    tokenizer = of_words((PAD, UNKNOWN, BOS, END_OF_TEXT, USER, ASSISTANT, PICTURE, BEGIN, END), silent=":\n",
                         pad_token=PAD, eos_token=END_OF_TEXT, bos_token=BOS)
    return Janus(
        ar=llama.Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=2, vocab_size=len(tokenizer), image_vocab_size=CODES, code_width=8,
                        vision_width=16, image_head_width=32),
        vision=siglip.Config(width=16, layers=1, heads=2, mlp_hidden=32, patch_size=PATCH, pos_table_side=SIDE),
        vq=vq.Config(codebook_size=CODES, codebook_dim=8, z_channels=16, channels=32, multipliers=(1, 1, 1, 1, 1),
                     res_blocks=1),
        tokenizer=tokenizer, grid=(SIDE, SIDE),
        transform=siglip.Transform(image_size=PATCH * SIDE, min_size=14))


def write_json(path, values):
    path.write_text(json.dumps(values, indent=1))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python notebooks/tiny_janus.py DIR")
    print(write(sys.argv[1]))
