"""What each field of a model folder's configurations means to sbrush: one table for each kind of part.

Every field is HONOURED (the network is built by it, or sbrush computes with it, as diffusers' own pipeline does),
without effect on what sbrush computes (`irrelevant`, with the reason), or accepted with certain values `only`. A value
that a table does not accept, or a field that it does not know, is refused by name when a folder is loaded: nothing is
passed over. tests/test_configurations.py holds the tables against the signatures of diffusers and transformers.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sbrush.console import SbrushError, printable

SIZE_BEFORE_0_9 = 64  # latents, where a UNet that diffusers wrote before 0.9 names fewer


class Rule(NamedTuple):
    """What a field means; `allowed`: the values that are accepted, None: all that the library accepts."""

    why: str
    allowed: tuple[Any, ...] | None = None
    hint: str = "take a model without it; sbrush distills Stable Diffusion 1.x, 2.x and XL"


HONOURED = Rule("as diffusers' own pipeline does")
Table = Mapping[str, Rule]


def irrelevant(why: str) -> Rule:
    """A field that changes nothing that sbrush computes."""
    return Rule(why)


def only(*values: Any, why: str, hint: str = Rule._field_defaults["hint"]) -> Rule:
    """A field of which sbrush accepts these values alone; `why`: what another one would mean."""
    return Rule(why, values, hint)


def _all(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


WRITTEN = _all(
    "_class_name _diffusers_version _name_or_path _commit_hash _use_default_values _ignore_files dtype torch_dtype",
    irrelevant("says who wrote it, and how"),
)
CLASSES = only(None, why="it takes a class beside the prompt")
ZERO = (None, 0, 0.0, False)

UNET: Table = {
    **WRITTEN,
    **_all(
        """sample_size in_channels out_channels center_input_sample flip_sin_to_cos freq_shift down_block_types
        mid_block_type up_block_types only_cross_attention block_out_channels layers_per_block downsample_padding
        mid_block_scale_factor act_fn norm_num_groups norm_eps cross_attention_dim transformer_layers_per_block
        reverse_transformer_layers_per_block attention_head_dim use_linear_projection
        upcast_attention resnet_time_scale_shift resnet_skip_time_act resnet_out_scale_factor time_embedding_dim
        time_embedding_act_fn timestep_post_act conv_in_kernel conv_out_kernel mid_block_only_cross_attention
        cross_attention_norm""",
        HONOURED,
    ),
    **_all("class_embed_type num_class_embeds", CLASSES),
    **_all("addition_time_embed_dim projection_class_embeddings_input_dim", irrelevant("it embeds no sizes")),
    **_all(
        "decay min_decay inv_gamma power update_after_step optimization_step use_ema_warmup",
        irrelevant("of the average that the weights were taken from"),
    ),
    "class_embeddings_concat": only(*ZERO, why="it takes a class beside the prompt"),
    "dropout": only(
        *ZERO, why="a student would be trained with it, and a teacher draw other images than in diffusers",
        hint="set it to 0 in unet/config.json: it has no effect on drawing",
    ),
    "dual_cross_attention": only(*ZERO, why="it takes two texts, or a text and an image"),
    "encoder_hid_dim": only(None, why="it takes embeddings of another kind than the text encoder's"),
    "encoder_hid_dim_type": only(None, why="it takes embeddings of another kind than the text encoder's"),
    "addition_embed_type": only(None, why="it takes more than the prompt, which this pipeline does not give it"),
    "addition_embed_type_num_heads": irrelevant("of an addition_embed_type that is refused"),
    "num_attention_heads": only(
        None, why="diffusers takes it from attention_head_dim", hint="state attention_head_dim, as published UNets do"
    ),
    "time_embedding_type": only("positional", why="training would change its random frequencies"),
    "time_cond_proj_dim": only(
        None, why="it takes a guidance scale as input, as latent consistency models do, and is no plain teacher",
        hint="take the model that it was distilled from as the teacher",
    ),
    "attention_type": only("default", why="it takes boxes or images beside the prompt (GLIGEN)"),
}  # fmt: skip
UNET_XL: Table = {
    **UNET,
    **_all("addition_time_embed_dim projection_class_embeddings_input_dim", HONOURED),
    "addition_embed_type": only("text_time", why="Stable Diffusion XL's pipeline tells its UNet of sizes and text"),
}
CONTROL: Table = {
    **WRITTEN,
    **_all(
        """in_channels flip_sin_to_cos freq_shift down_block_types mid_block_type only_cross_attention
        block_out_channels layers_per_block downsample_padding mid_block_scale_factor act_fn norm_num_groups norm_eps
        cross_attention_dim transformer_layers_per_block attention_head_dim num_attention_heads use_linear_projection
        upcast_attention resnet_time_scale_shift addition_embed_type addition_time_embed_dim
        projection_class_embeddings_input_dim controlnet_conditioning_channel_order
        conditioning_embedding_out_channels""",
        HONOURED,
    ),
    "sample_size": irrelevant("it takes latents of any size"),
    "conditioning_channels": only(3, why="its control images are not RGB"),
    **_all("class_embed_type num_class_embeds", CLASSES),
    **_all("encoder_hid_dim encoder_hid_dim_type", UNET["encoder_hid_dim"]),
    "addition_embed_type_num_heads": irrelevant("of an addition_embed_type that no pipeline has"),
    "global_pool_conditions": only(
        *ZERO, why="it says nothing of where things are, and its pipeline leaves it out for the empty prompt"
    ),
}
VAE: Table = {
    **WRITTEN,
    **_all(
        """down_block_types up_block_types block_out_channels layers_per_block act_fn latent_channels norm_num_groups
        scaling_factor use_quant_conv use_post_quant_conv mid_block_add_attention""",
        HONOURED,
    ),
    "in_channels": only(3, why="it is not for RGB images"),
    "out_channels": only(3, why="it does not give RGB images"),
    "sample_size": irrelevant("of tiles, which sbrush does not decode in"),
    "shift_factor": only(
        *ZERO, why="neither pipeline of Stable Diffusion shifts its latents",
        hint="a VAE of Stable Diffusion 3 or Flux does not fit; take the model's own",
    ),
    **_all(
        "latents_mean latents_std",
        only(None, why="diffusers' Stable Diffusion pipeline does not apply it: only XL's does"),
    ),
    "force_upcast": irrelevant("diffusers' Stable Diffusion pipeline decodes in its own dtype"),
}  # fmt: skip
VAE_XL: Table = {**VAE, **_all("latents_mean latents_std force_upcast", HONOURED)}
TINY_VAE: Table = {
    **WRITTEN,
    **_all(
        """encoder_block_out_channels decoder_block_out_channels act_fn upsample_fn latent_channels
        upsampling_scaling_factor num_encoder_blocks num_decoder_blocks scaling_factor""",
        HONOURED,
    ),
    **{name: VAE[name] for name in ("in_channels", "out_channels", "shift_factor")},
    **_all("latent_magnitude latent_shift", irrelevant("of latents kept as bytes")),
    **_all("force_upcast block_out_channels", irrelevant("sbrush decodes in float32")),
}
TEXT: Table = {
    **WRITTEN,
    **_all(
        """vocab_size hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads
        max_position_embeddings hidden_act layer_norm_eps use_attention_mask""",
        HONOURED,
    ),
    **_all("bos_token_id eos_token_id pad_token_id", Rule("held against the tokenizer's, see tokenizers.py")),
    **_all(
        "attention_dropout dropout initializer_range initializer_factor", irrelevant("of training; it stays frozen")
    ),
    "model_type": only("clip_text_model", "clip", None, why="it is no text encoder of CLIP"),
    "architectures": only(
        *([name] for name in ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")), None,
        why="it is no text encoder of CLIP",
    ),
    "return_dict": only(True, None, why="its outputs have no names"),
    "torchscript": only(*ZERO, why="its outputs have no names"),
    "pruned_heads": only({}, None, why="its attention heads were removed in part"),
    **_all(
        """transformers_version output_hidden_states output_attentions chunk_size_feed_forward problem_type id2label
        label2id is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder
        tie_word_embeddings use_bfloat16 tf_legacy_loss finetuning_task task_specific_params tokenizer_class prefix
        sep_token_id decoder_start_token_id use_cache _attn_implementation_autoset attn_implementation""",
        irrelevant("of other kinds of networks, or of outputs that are not asked for"),
    ),
    **_all(
        """max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
        top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
        bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
        forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
        begin_suppress_tokens""",
        irrelevant("of text generation"),
    ),
}  # fmt: skip
TEXT_XL: Table = {**TEXT, "use_attention_mask": irrelevant("Stable Diffusion XL's pipeline does not apply it")}
FLOW = only(*ZERO, why="it is of flow matching")
SCHEDULER: Table = {
    **WRITTEN,
    **_all(
        """num_train_timesteps beta_start beta_end trained_betas prediction_type rescale_betas_zero_snr""", HONOURED
    ),
    "beta_schedule": only("linear", "scaled_linear", "squaredcos_cap_v2", why="DDIM has no such noise schedule"),
    "thresholding": only(*ZERO, why="thresholds are for pixels, and these are latents"),
    "clip_sample": irrelevant("Stable Diffusion's pipeline turns it off"),
    "snr_shift_scale": only(1, 1.0, why="it shifts the noise schedule, as CogVideoX does"),
    "timestep_type": only("discrete", why="its timesteps are not those of a noise schedule of betas"),
    **_all("sigma_min sigma_max", only(None, why="it bends the noise schedule")),
    "predict_epsilon": only(True, why="the network predicts x0"),
    **_all("use_flow_sigmas use_dynamic_shifting", FLOW),
    **_all(
        """timestep_spacing steps_offset set_alpha_to_one clip_sample_range sample_max_value dynamic_thresholding_ratio
        skip_prk_steps variance_type interpolation_type use_karras_sigmas use_exponential_sigmas use_beta_sigmas
        use_lu_lambdas lambda_min_clipped solver_order solver_type algorithm_type lower_order_final euler_at_final
        final_sigmas_type predictor_order corrector_order tau_func predict_x0 disable_corrector solver_p eta
        original_inference_steps timestep_scaling flow_shift time_shift_type shift_terminal tensor_format""",
        irrelevant("of the folder's own sampler: sbrush's begins at T, is DDIM, and ends at the image"),
    ),
}
SCHEDULER_XL: Table = {
    **SCHEDULER,
    "clip_sample": only(
        *ZERO, why="Stable Diffusion XL's pipeline would clip latents to -1 to 1",
        hint="set it to false in scheduler/scheduler_config.json, as the published folders do",
    ),
}  # fmt: skip
GUIDED: Table = {"time_cond_proj_dim": HONOURED}  # a student may take a guidance scale as input, as a teacher may not
ONE_STEP: Table = {"final_sigmas_type": only("zero", None, why="its one step would not end at the image")}
INDEX: Table = {
    **WRITTEN,
    **_all("safety_checker requires_safety_checker feature_extractor", irrelevant("sbrush draws without one")),
    "image_encoder": irrelevant("of image prompts"),
    "force_zeros_for_empty_prompt": irrelevant("of Stable Diffusion XL"),
    "add_watermarker": only(*ZERO, why="sbrush leaves images unmarked", hint="set it to false in model_index.json"),
    "requires_aesthetics_score": only(*ZERO, why="it is a refiner, which takes a score beside the prompt"),
}
INDEX_XL: Table = {**INDEX, "force_zeros_for_empty_prompt": HONOURED}
TABLES: dict[str, dict[str, Table]] = {
    "StableDiffusionPipeline": {
        "unet": UNET, "vae": VAE, "text_encoder": TEXT, "scheduler": SCHEDULER, "index": INDEX,
    },
    "StableDiffusionXLPipeline": {
        "unet": UNET_XL, "vae": VAE_XL, "text_encoder": TEXT_XL, "text_encoder_2": TEXT_XL, "scheduler": SCHEDULER_XL,
        "index": INDEX_XL,
    },
}  # fmt: skip


def check_fields(config: Mapping[str, Any], table: Table, where: str) -> None:
    """SbrushError if a configuration has a field that the table does not know, or a value that it does not accept.

    An unknown field that is null turns nothing on. `where`: whose configuration it is, for the message.
    """
    for key, value in config.items():
        rule = table.get(key)
        shown = f"{printable(key)} {printable(json.dumps(value, default=str)[:60])}"
        if rule is None and value is not None:
            raise SbrushError(
                f"{where} has {shown}, which sbrush does not know",
                "take it out, if the model is right without it; a newer sbrush may know it",
                code=2,
            )
        if rule is not None and rule.allowed is not None and value not in rule.allowed:
            raise SbrushError(f"{where} has {shown}: {rule.why}", rule.hint, code=2)


def check_scheduler(config: Mapping[str, Any], kind: Any, table: Table, where: str) -> None:
    """As check_fields, for a scheduler of class `kind`: what its configuration leaves out is its class's default."""
    own = {
        name: field.default
        for name, field in inspect.signature(kind).parameters.items()
        if field.kind is not field.VAR_KEYWORD
    }
    if "clip_sample" not in own:  # a sampler that does not know it does not clip
        table = {**table, "clip_sample": irrelevant("of other samplers")}
    check_fields({**own, **config}, table, where)


def size_as_diffusers_reads(config: Mapping[str, Any]) -> Any:
    """A UNet's sample_size; below 64 it was none before diffusers 0.9, whose pipeline takes 64 for such a UNet."""
    size, written = config.get("sample_size"), re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version")))
    old = written is not None and (int(written[1]), int(written[2])) < (0, 9)
    if old and isinstance(size, int) and size < SIZE_BEFORE_0_9 and config.get("addition_embed_type") is None:
        return SIZE_BEFORE_0_9
    return size
