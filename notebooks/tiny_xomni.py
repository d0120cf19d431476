"""A random X-Omni of half a megabyte in the published format, to try everything where the weights are not.

    python notebooks/tiny_xomni.py DIR

writes DIR/X-Omni-En (the image tokenizer and the decoder's transformer inside) and DIR/FLUX.1-dev, every file that
gvu_jax.convert reads of the originals. What the model draws is noise, and it reads the words of the shapes world.
"""
import json
import sys
from pathlib import Path

import jax
import numpy as np

from gvu_jax import tensor_files
from gvu_jax.families.xomni import XOmni
from gvu_jax.models import flux, siglip_vq, text_encoders, torch_keys, vae, xomni
from gvu_jax.shapes.tokenizer import IMAGE_MARKS, build_tokenizer

CODES, SIDE = 32, 48          # of the image tokenizer; pixels of a picture


def write(folder):
    """Writes both directories into `folder`, and returns their paths: (X-Omni-En, FLUX.1-dev)."""
    source, base = Path(folder) / "X-Omni-En", Path(folder) / "FLUX.1-dev"
    tokenizer, umm = build_tokenizer(CODES), tiny()
    params = jax.device_get(jax.jit(umm.init)(jax.random.key(0)))
    vit = params["vision"].pop("vit")

    decoder = {"model_path": "decoder", "cfg_scale": umm.diffusion_guidance, "cfg_scale_2": umm.diffusion_guidance,
               "num_inference_steps": umm.diffusion_steps, "upscale_factor": 2 * umm.vae.downscale}
    encoder = {"siglip_name": "tiny", "siglip_path": "vit/siglip_vit.pt", "projector_path": "vit/vq_projector.pt",
               "with_norm": True, "codebook_size": CODES, "codebook_dim": umm.vision.codebook_dim,
               "z_channels": umm.vision.z_channels}
    write_json(source, vars(umm.ar) | {
        "model_type": "x-omni", "hidden_act": "silu", "rope_scaling": None, "tie_word_embeddings": False,
        "use_sliding_window": False, "mm_special_tokens": IMAGE_MARKS,
        "vision_config": {"decoder": decoder, "encoder": encoder, "transform": vars(umm.transform)}})
    write_json(source / "vit", {"siglip_config": {"heads": umm.vision.heads}, "groupnorm_groups": umm.vision.groups})
    write_json(source / "decoder", vars(umm.flux) | {"patch_size": 1, "out_channels": None})
    levels = len(umm.vae.block_out_channels)
    write_json(base / "vae", vars(umm.vae) | {
        "act_fn": "silu", "in_channels": 3, "out_channels": 3, "mid_block_add_attention": True,
        "use_quant_conv": False, "use_post_quant_conv": False,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels})
    write_json(base / "text_encoder", vars(umm.clip))
    write_json(base / "text_encoder_2", vars(umm.t5))
    write_json(base / "scheduler", {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "use_dynamic_shifting": True,
        "base_image_seq_len": umm.schedule.base_tokens, "max_image_seq_len": umm.schedule.max_tokens,
        "base_shift": umm.schedule.base_shift, "max_shift": umm.schedule.max_shift}, "scheduler_config.json")
    for place in (source, base / "tokenizer", base / "tokenizer_2"):
        tokenizer.save_pretrained(place)

    write_tensors(source / "model.safetensors", params["ar"], xomni.rules(umm.ar))
    write_tensors(source / "vit/siglip_vit.pt", vit, siglip_vq.RULES)
    write_tensors(source / "vit/vq_projector.pt", params["vision"], siglip_vq.RULES)
    write_tensors(source / "decoder/diffusion_pytorch_model.safetensors", params["flux"], flux.RULES)
    write_tensors(base / "vae/diffusion_pytorch_model.safetensors", params["vae"], vae.RULES)
    write_tensors(base / "text_encoder/model.safetensors", params["clip"], text_encoders.rules(umm.clip, ()))
    write_tensors(base / "text_encoder_2/model.safetensors", params["t5"], text_encoders.rules(umm.t5, ()))
    return source, base


def tiny():
    """The sizes: each part as small as its architecture allows."""
    tokenizer = build_tokenizer(CODES)
    vocabulary = len(tokenizer)
    return XOmni(
        ar=xomni.Config(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=tokenizer.convert_tokens_to_ids("<MM-Token-0>"), mm_vocab_size=CODES + len(IMAGE_MARKS),
            image_vocab_size=CODES, num_mm_adap_layers=1, num_mm_head_layers=1),
        vision=siglip_vq.Config(width=32, layers=1, heads=2, mlp_hidden=32, patch_size=16, pos_table_side=3,
                                codebook_size=CODES, codebook_dim=8, z_channels=16, groups=4),
        flux=flux.Config(in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
                         num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
                         guidance_embeds=True, axes_dims_rope=(4, 6, 6), siglip_channels=16),
        vae=vae.Config(latent_channels=16, block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
                       scaling_factor=0.3611, shift_factor=0.1159),
        t5=text_encoders.T5Config(vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                                  feed_forward_proj="gated-gelu"),
        clip=text_encoders.ClipConfig(vocab_size=vocabulary, hidden_size=16, intermediate_size=16,
                                      num_hidden_layers=1, num_attention_heads=2),
        transform=siglip_vq.Transform(short_size=SIDE, long_size=3 * SIDE, patch_size=16, min_short_size=16,
                                      max_aspect_ratio=3.0),
        tokenizer=tokenizer, t5_tokenizer=tokenizer, clip_tokenizer=tokenizer, grid=(SIDE // 16, SIDE // 16),
        diffusion_steps=2, diffusion_guidance=2.5)


def write_json(folder, values, name="config.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values, indent=1))


def write_tensors(path, params, rules):
    """A tree of parameters under the names and in the layout of torch."""
    tensors = torch_keys.to_torch(params, rules)
    specs = {name: tensor_files.Spec(np.dtype(array.dtype), array.shape, 0) for name, array in tensors.items()}
    tensor_files.write_file(path, tensor_files.safetensors_header(specs), tensors.__getitem__)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python notebooks/tiny_xomni.py DIR")
    print(*write(sys.argv[1]), sep="\n")
