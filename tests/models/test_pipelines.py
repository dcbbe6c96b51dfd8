"""diffusers' pipelines over our parts, without a text encoder."""

import numpy as np
import pytest
import torch
from diffusers import LTXConditionPipeline, LTXImageToVideoPipeline, LTXPipeline
from PIL import Image

from ltxforge.models import tiny
from ltxforge.models.ltx_video import LTXVideo
from ltxforge.models.ltx_video_sampling import make_pipeline
from ltxforge.specs import TINY

CPU = torch.device("cpu")
KINDS = {
    ("tiny/ltx-video-0.9.0", False): LTXPipeline,
    ("tiny/ltx-video-0.9.1", False): LTXPipeline,
    ("tiny/ltx-video-0.9.1", True): LTXImageToVideoPipeline,
    ("tiny/ltx-video", False): LTXConditionPipeline,
    ("tiny/ltx-video", True): LTXConditionPipeline,
}


@pytest.mark.parametrize(("name", "with_image"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pipelines_sample_from_embeddings(name, with_image, dtype):
    spec = TINY[name]
    model = LTXVideo(spec, spec.rope, tiny.tiny_parts(spec), CPU, dtype)
    model.load_transformer()
    draw = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 12, spec.caption_channels, generator=draw).to(dtype)
    image = {"image": Image.fromarray(np.full((64, 96, 3), 200, np.uint8))} if with_image else {}
    with model.vae():
        vae = model._loaded_vae().to(dtype)
        pipeline = make_pipeline(model.rope, with_image, model.transformer, vae, model._parts.scheduler())
        assert type(pipeline) is KINDS[name, with_image]
        assert pipeline.transformer is model.transformer
        frames = pipeline(
            prompt_embeds=embeds[:1], prompt_attention_mask=torch.ones(1, 12), negative_prompt_embeds=embeds[1:],
            negative_prompt_attention_mask=torch.ones(1, 12), height=64, width=96, num_frames=9, frame_rate=24,
            num_inference_steps=2, guidance_scale=spec.sampling.guidance,
            decode_timestep=spec.sampling.decode_timestep, decode_noise_scale=spec.sampling.decode_noise_scale,
            generator=torch.Generator().manual_seed(3), output_type="np", **image,
        ).frames  # fmt: skip
    assert frames.shape == (1, 9, 64, 96, 3)
    assert np.isfinite(frames).all()
    assert frames.std() > 0.01


def test_distilled_timesteps_are_the_pipelines_own_schedule_of_eight_steps():
    from_pipeline = LTXConditionPipeline.__init__.__globals__["linear_quadratic_schedule"](8) * 1000
    assert torch.allclose(torch.tensor(TINY["tiny/ltx-video-0.9.8"].sampling.timesteps), from_pipeline)
