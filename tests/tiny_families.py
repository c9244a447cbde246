"""A small random-weight model of every family's real class with its real processor, built offline in a moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from tokenizers.processors import TemplateProcessing

from catpo.models.family import Family
from catpo.models.loading import family_of
from tiny import tokenizer

END = "<|end|>"


def build(name: str, seed: int = 0, *, sharp: float = 12.0) -> Family:
    """A model of about 100 thousand parameters; `sharp` scales queries and keys, so that errors of attention would show."""
    torch.manual_seed(seed)
    model, processor = (BUILDERS | OTHERS)[name]()
    model.eval()
    model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids(END)
    model.generation_config.pad_token_id = 0
    family = family_of(model, processor, model_id=f"tiny-{name}-{seed}")
    for each, parameter in family.decoder.named_parameters():
        if "q_proj" in each or "k_proj" in each:
            parameter.data *= sharp**0.5
    return family


def chat(image: str, *, bos: str = "", system: str = "") -> str:
    """A chat template in which every picture is written as `image`."""
    return (
        bos
        + system
        + "{% for m in messages %}{{ m['role'] + ':\n' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}" + image + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
        "{% endif %}{{ '" + END + "\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    )


def tokenizer_with(**tokens: str) -> Any:
    """A tokenizer that knows the family's tokens by their attribute names (`image_token="<image>"`).

    It adds a begin-of-sequence token, as Llama's does; some chat templates write one as well.
    """
    bpe = tokenizer((END, *dict.fromkeys(tokens.values())), extra=tokens)
    bpe.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bpe.bos_token_id)])
    return bpe


def text(kind: str | None, tokens: Any, **more: Any) -> dict[str, Any]:
    return ({} if kind is None else {"model_type": kind}) | dict(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0, **more,
    )  # fmt: skip


def vision(**more: Any) -> dict[str, Any]:
    return dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, patch_size=14) | more


def with_clip(config: Any, model: Any, **more: Any) -> tuple[Any, Any]:
    tokens = tokenizer_with(image_token="<image>")
    settings = config(
        vision_config=vision(model_type="clip_vision_model", num_hidden_layers=3, image_size=56),
        text_config=text("llama", tokens), image_token_index=tokens.image_token_id, image_seq_length=16, **more,
    )  # fmt: skip
    pictures = tf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return model(settings), tf.LlavaProcessor(
        pictures, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat("<image>\n"),
    )  # fmt: skip


def llava() -> tuple[Any, Any]:
    return with_clip(tf.LlavaConfig, tf.LlavaForConditionalGeneration)


def vipllava() -> tuple[Any, Any]:
    """Has no family of its own: stands for all others."""
    return with_clip(tf.VipLlavaConfig, tf.VipLlavaForConditionalGeneration, vision_feature_layers=[-1, -2])


def with_pixtral(config: Any, model: Any, merge: int, longest: int, template: str, **more: Any) -> tuple[Any, Any]:
    tokens = tokenizer_with(image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")
    settings = config(
        vision_config=vision(model_type="pixtral", image_size=112), text_config=text("mistral", tokens, head_dim=16),
        image_token_index=tokens.image_token_id, **more,
    )  # fmt: skip
    pictures = tf.PixtralImageProcessor(size={"longest_edge": longest}, patch_size=14 * merge)
    return model(settings), tf.PixtralProcessor(
        pictures, tokens, patch_size=14, spatial_merge_size=merge, chat_template=template
    )


def pixtral() -> tuple[Any, Any]:
    more = dict(vision_feature_layer=-1, vision_feature_select_strategy="full")
    return with_pixtral(tf.LlavaConfig, tf.LlavaForConditionalGeneration, 1, 84, chat("[IMG]"), **more)


def mistral3() -> tuple[Any, Any]:
    template = chat("[IMG]", bos="<s>")
    return with_pixtral(tf.Mistral3Config, tf.Mistral3ForConditionalGeneration, 2, 112, template, spatial_merge_size=2)


def llava_next() -> tuple[Any, Any]:
    tokens, grid = tokenizer_with(image_token="<image>"), [[56, 112], [112, 56], [112, 112]]
    config = tf.LlavaNextConfig(
        vision_config=vision(model_type="clip_vision_model", num_hidden_layers=3, image_size=56),
        text_config=text("mistral", tokens, sliding_window=32), image_token_index=tokens.image_token_id,
        image_grid_pinpoints=grid,
    )  # fmt: skip
    pictures = tf.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=grid
    )
    return tf.LlavaNextForConditionalGeneration(config), tf.LlavaNextProcessor(
        pictures, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat("<image>"),
    )  # fmt: skip


def llava_onevision() -> tuple[Any, Any]:
    tokens, grid = (
        tokenizer_with(image_token="<image>", video_token="<video>"),
        [[56, 56], [56, 112], [112, 56], [112, 112], [56, 168]],
    )
    config = tf.LlavaOnevisionConfig(
        vision_config=vision(model_type="siglip_vision_model", image_size=56, vision_use_head=False),
        text_config=text("qwen2", tokens), image_token_index=tokens.image_token_id, video_token_index=tokens.video_token_id,
        image_grid_pinpoints=grid, vision_feature_select_strategy="full", vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    pictures = tf.LlavaOnevisionImageProcessor(size={"height": 56, "width": 56}, image_grid_pinpoints=grid)
    return tf.LlavaOnevisionForConditionalGeneration(config), tf.LlavaOnevisionProcessor(
        pictures, tokens, tf.LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56}), num_image_tokens=16,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_2", chat_template=chat("<image>"),
    )  # fmt: skip


def qwen(config: Any, model: Any, processor: Any, tower: dict[str, Any], rope: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    tokens = tokenizer_with(
        image_token="<|image_pad|>", video_token="<|video_pad|>", vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
    )  # fmt: skip
    settings = config(
        text_config=text(None, tokens, rope_parameters={"rope_type": "default", "rope_theta": 1e4, **rope}, **more),
        vision_config=tower, image_token_id=tokens.image_token_id, video_token_id=tokens.video_token_id,
        vision_start_token_id=tokens.vision_bos_token_id, vision_end_token_id=tokens.vision_eos_token_id,
    )  # fmt: skip
    patch = tower["patch_size"]
    size = {"shortest_edge": (4 * patch) ** 2, "longest_edge": (8 * patch) ** 2}
    pictures = tf.Qwen2VLImageProcessor(patch_size=patch, merge_size=2, size=size)
    videos = (tf.Qwen3VLVideoProcessor if processor is tf.Qwen3VLProcessor else tf.Qwen2VLVideoProcessor)(patch_size=patch)
    template = chat("<|vision_start|><|image_pad|><|vision_end|>", system="system:\nbe brief\n")
    return model(settings), processor(pictures, tokens, videos, chat_template=template)


def qwen2_vl() -> tuple[Any, Any]:
    tower = dict(depth=2, embed_dim=32, hidden_size=64, num_heads=4, patch_size=14, mlp_ratio=2)
    rope = dict(mrope_section=[2, 3, 3])
    return qwen(tf.Qwen2VLConfig, tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLProcessor, tower, rope)


def qwen2_5_vl() -> tuple[Any, Any]:
    tower = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=14, out_hidden_size=64, window_size=56,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    rope = dict(mrope_section=[2, 3, 3])
    return qwen(tf.Qwen2_5_VLConfig, tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLProcessor, tower, rope)


def qwen3_vl() -> tuple[Any, Any]:
    tower = dict(
        depth=3, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=16, out_hidden_size=64,
        deepstack_visual_indexes=[0, 1], num_position_embeddings=64,
    )  # fmt: skip
    rope = dict(mrope_section=[2, 3, 3], mrope_interleaved=True)
    return qwen(tf.Qwen3VLConfig, tf.Qwen3VLForConditionalGeneration, tf.Qwen3VLProcessor, tower, rope, head_dim=16)


def internvl() -> tuple[Any, Any]:
    tokens = tokenizer_with(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    config = tf.InternVLConfig(
        vision_config=vision(image_size=[56, 56], patch_size=[14, 14]), text_config=text("qwen2", tokens),
        image_token_id=tokens.context_image_token_id, image_seq_length=4, downsample_ratio=0.5,
    )  # fmt: skip
    pictures = tf.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4)
    return tf.InternVLForConditionalGeneration(config), tf.InternVLProcessor(
        pictures, tokens, tf.InternVLVideoProcessor(), image_seq_length=4, chat_template=chat("<IMG_CONTEXT>\n")
    )


def rows_and_columns(config: Any, model: Any) -> tuple[Any, Any, Any]:
    tiles = {f"tile_{r}_{c}": f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)}
    tokens = tokenizer_with(
        image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>", video_token="<video>", **tiles,
    )  # fmt: skip
    settings = config(
        text_config=text("llama", tokens), vision_config=vision(image_size=56), image_token_id=tokens.image_token_id,
        scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    pictures = dict(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}, do_image_splitting=True)
    return tokens, model(settings), pictures


def idefics3() -> tuple[Any, Any]:
    tokens, model, pictures = rows_and_columns(tf.Idefics3Config, tf.Idefics3ForConditionalGeneration)
    images = tf.Idefics3ImageProcessor(**pictures)
    return model, tf.Idefics3Processor(images, tokens, image_seq_len=4, chat_template=chat("<image>"))


def smolvlm() -> tuple[Any, Any]:
    tokens, model, pictures = rows_and_columns(tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration)
    images, videos = tf.SmolVLMImageProcessor(**pictures), tf.SmolVLMVideoProcessor(num_frames=2, fps=1)
    return model, tf.SmolVLMProcessor(images, tokens, videos, image_seq_len=4, chat_template=chat("<image>"))


def gemma3() -> tuple[Any, Any]:
    tokens = tokenizer_with(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    config = tf.Gemma3Config(
        vision_config=vision(image_size=56), mm_tokens_per_image=4, boi_token_index=tokens.boi_token_id,
        eoi_token_index=tokens.eoi_token_id, image_token_index=tokens.image_token_id,
        text_config=text(
            None, tokens, head_dim=16, sliding_window=16, query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    )  # fmt: skip
    pictures = tf.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    model = tf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # made as zeros
    return model, tf.Gemma3Processor(pictures, tokens, image_seq_length=4, chat_template=chat("<start_of_image>", bos="<s>"))


def paligemma() -> tuple[Any, Any]:
    return with_prefix(dict(model_type="gemma"))


def paligemma2() -> tuple[Any, Any]:
    """Gemma 2 decoder: soft caps on attention scores and logits, every other layer with a sliding window."""
    caps = dict(attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
    return with_prefix(dict(model_type="gemma2", sliding_window=64, query_pre_attn_scalar=16, **caps))


def with_prefix(decoder: dict[str, Any]) -> tuple[Any, Any]:
    tokens = tokenizer_with(image_token="<image>")
    pictures = tf.SiglipImageProcessor(size={"height": 56, "width": 56})
    pictures.image_seq_length = 16
    processor = tf.PaliGemmaProcessor(pictures, tokens)
    config = tf.PaliGemmaConfig(
        vision_config=vision(model_type="siglip_vision_model", image_size=56, projection_dim=64, vision_use_head=False),
        text_config=text(None, tokens, head_dim=16) | decoder, image_token_index=tokens.image_token_id, projection_dim=64,
        hidden_size=64,
    )  # fmt: skip
    return tf.PaliGemmaForConditionalGeneration(config), processor


def aya_vision() -> tuple[Any, Any]:
    """A decoder of parallel blocks whose layers differ: three with a sliding window and rotary positions, one with neither."""
    names = dict(start_of_img_token="<soi>", end_of_img_token="<eoi>", img_patch_token="<patch>", img_line_break_token="<line>")
    tokens = tokenizer_with(image_token="<image>", **names, tile_token="TILE", tile_global_token="TILE_GLOBAL", tile="<patch>")
    config = tf.AyaVisionConfig(
        vision_config=vision(model_type="siglip_vision_model", image_size=56, vision_use_head=False),
        text_config=text("cohere2", tokens, sliding_window=16, layer_types=["sliding_attention"] * 2 + ["full_attention"]),
        image_token_index=tokens.tile_id,
    )  # fmt: skip
    pictures = tf.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=False)
    return tf.AyaVisionForConditionalGeneration(config), tf.AyaVisionProcessor(
        pictures, tokens, patch_size=14, img_size=56, downsample_factor=2, chat_template=chat("<image>"), **names
    )


def glm4v() -> tuple[Any, Any]:
    """Positions in three axes, computed by the model alone."""
    tokens = tokenizer_with(
        image_token="<|image|>", video_token="<|video|>", begin="<|begin_of_image|>", finish="<|end_of_image|>",
        begin_video="<|begin_of_video|>", finish_video="<|end_of_video|>",
    )  # fmt: skip
    tower = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=14, out_hidden_size=64, image_size=56)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = tf.Glm4vConfig(
        text_config=text(None, tokens, rope_parameters=rope), vision_config=tower, image_token_id=tokens.image_token_id,
        video_token_id=tokens.video_token_id, image_start_token_id=tokens.begin_id, image_end_token_id=tokens.finish_id,
        video_start_token_id=tokens.begin_video_id, video_end_token_id=tokens.finish_video_id,
    )  # fmt: skip
    pictures = tf.Glm4vImageProcessor(patch_size=14, size={"shortest_edge": 112 * 56, "longest_edge": 112 * 112 * 2})
    return tf.Glm4vForConditionalGeneration(config), tf.Glm4vProcessor(
        pictures, tokens, tf.Glm4vVideoProcessor(patch_size=14),
        chat_template=chat("<|begin_of_image|><|image|><|end_of_image|>"),
    )  # fmt: skip


def lfm2_vl() -> tuple[Any, Any]:
    """Convolutions between the attention layers, which mix neighbours of a row whatever the mask says."""
    tokens = tokenizer_with(
        image_token="<image>", image_start_token="<|image_start|>", image_end_token="<|image_end|>",
        image_thumbnail="<|img_thumbnail|>",
    )  # fmt: skip
    config = tf.Lfm2VlConfig(
        text_config=text("lfm2", tokens, layer_types=["conv", "full_attention", "full_attention"]),
        vision_config=vision(model_type="siglip2_vision_model", num_patches=64, vision_use_head=False),
        image_token_id=tokens.image_token_id, projector_hidden_size=48,
    )  # fmt: skip
    pictures = tf.Lfm2VlImageProcessor(
        encoder_patch_size=14, downsample_factor=2, do_image_splitting=False, min_image_tokens=4, max_image_tokens=16,
        max_num_patches=64, tile_size=56,
    )  # fmt: skip
    return tf.Lfm2VlForConditionalGeneration(config), tf.Lfm2VlProcessor(pictures, tokens, chat_template=chat("<image>"))


def mllama() -> tuple[Any, Any]:
    """Sees the picture in cross-attention layers: its one image token carries nothing."""
    tokens = tokenizer_with(image_token="<|image|>", python_token="<|python_tag|>")
    config = tf.MllamaConfig(
        vision_config=dict(
            hidden_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=4, intermediate_size=48,
            vision_output_dim=64, image_size=56, patch_size=14, intermediate_layers_indices=[0], max_num_tiles=4,
        ),
        text_config=text(None, tokens, cross_attention_layers=[1]) | dict(num_hidden_layers=3),
        image_token_index=tokens.image_token_id,
    )  # fmt: skip
    pictures = tf.MllamaImageProcessor(size={"height": 56, "width": 56}, max_image_tiles=4)
    return tf.MllamaForConditionalGeneration(config), tf.MllamaProcessor(pictures, tokens, chat_template=chat("<|image|>"))


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    build.__name__: build
    for build in (
        llava, pixtral, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, internvl, idefics3, smolvlm, gemma3,
        paligemma, paligemma2, mistral3, vipllava,
    )
}  # fmt: skip
"""For every family, and one model without a family."""
OTHERS: dict[str, Callable[[], tuple[Any, Any]]] = {build.__name__: build for build in (aya_vision, glm4v, lfm2_vl, mllama)}
"""More model types without a family."""
