"""The published X-Omni in numbers, for planning and for tests at full size where its weights are not.

The backbone is Qwen2.5-7B with four layers before and four after its 28; the pictures' side is a giant SigLIP with
16384 codes and FLUX.1-dev: transformer, autoencoder, T5-XXL and CLIP-L. A converted checkpoint says all this itself.
"""
from gvu_jax.models import flux, siglip_vq, text_encoders, vae, xomni

PUBLISHED = dict(                                                            # fields of umm.XOmni
    ar=xomni.Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=36, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, mm_vocab_size=16448, image_vocab_size=16384, num_mm_adap_layers=4, num_mm_head_layers=4),
    vision=siglip_vq.Config(
        width=1536, layers=40, heads=16, mlp_hidden=6144, patch_size=16, pos_table_side=24, codebook_size=16384,
        codebook_dim=2048, z_channels=1536),
    flux=flux.Config(
        in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
        siglip_channels=1536),
    vae=vae.Config(
        latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
        scaling_factor=0.3611, shift_factor=0.1159),
    t5=text_encoders.T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu"),
    clip=text_encoders.ClipConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    diffusion_steps=28, diffusion_guidance=2.5)                              # guided: two forwards a step
