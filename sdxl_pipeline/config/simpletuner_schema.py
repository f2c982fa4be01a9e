"""Keys of SimpleTuner's two files beyond the supported settings: aliases, unsupported keys, and keys without meaning for SDXL.

An unsupported key is accepted with the values that mean "off", so that a file which contains a default works; any other value is
rejected, since ignoring it would train something else.
"""

from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True)
class UnsupportedKey:
    """A key that is not supported: the values that mean "off", the first of them preferred, and what to write instead."""

    off: tuple[Any, ...]
    hint: str = ""


@dataclass(frozen=True)
class KeySchema:
    """Known keys of one kind of object beside the fields of its model.

    `spellings`: alias -> name. `no_effect`: accepted keys without effect -> what happens instead. `unsupported`: keys that are not
    supported. `unsupported_values`: values of supported keys that are not supported. `inactive`: keys that only tune an unsupported
    feature -> the key of that feature. `ignored`: keys of other models or of SimpleTuner's internals, by name and by prefix.
    """

    spellings: dict[str, str] = field(default_factory=dict)
    no_effect: dict[str, str] = field(default_factory=dict)
    unsupported: dict[str, UnsupportedKey] = field(default_factory=dict)
    unsupported_values: dict[str, frozenset[str]] = field(default_factory=dict)
    inactive: dict[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    ignored_prefixes: tuple[str, ...] = ()

    def is_ignored(self, key: str) -> bool:
        """Return whether the key is known and has no effect here."""
        return key in self.ignored or key.startswith(self.ignored_prefixes)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _off(off: tuple[Any, ...], names: str) -> dict[str, UnsupportedKey]:
    return {name: UnsupportedKey(off) for name in names.split()}


def _tuned_by(switch: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), switch)


_NOTHING_IS_DELETED = UnsupportedKey(
    (False, None), "write false: the images are never changed or deleted here"
)
_ATTENTION = "PyTorch's scaled_dot_product_attention is used unless attention_mechanism names another kernel, such as xformers"
_IN_OPTIMIZER_CONFIG = (
    'write it in optimizer_config, for example "beta1=0.9,beta2=0.99,weight_decay=0.01,eps=1e-8"'
)

TRAINING: Final = KeySchema(
    spellings={
        "use_gradient_checkpointing": "gradient_checkpointing",
        "checkpointing_steps": "checkpoint_step_interval",
        "validation_steps": "validation_step_interval",
        "save_total_limit": "checkpoints_total_limit",
        "peft_lora_target_modules": "lora_target_modules",
    },
    no_effect={
        "xformers": _ATTENTION,
        "use_xformers": _ATTENTION,
        "enable_xformers_memory_efficient_attention": _ATTENTION,
        "allow_tf32": "matrices are multiplied in mixed_precision, and float32 ones without TF32 rounding",
        "trust_remote_code": "code from a model repository is never run here",
    },
    unsupported={
        **_off(
            (False, None),
            """controlnet control refiner_training urepa_enabled xm_enabled
            validation_using_datasets
            slider_lora_target enable_nsfw_check optimizer_release_gradients
            optimizer_offload_gradients fuse_optimizer fsdp_cpu_offload fsdp_activation_checkpointing ramtorch enable_group_offload quantize_activations
            enable_watermark gradient_checkpointing_offload_attention""",
        ),
        **_off(
            (None, ""),
            """publishing_config distillation_method validation_input
            validation_adapter_path validation_adapter_config validation_guidance_skip_layers
            deepspeed_config accelerate_config accelerate_extra_args optimizer_cpu_offload_method
            quantization_config pretrained_unet_model_name_or_path assistant_lora_path custom_tracker post_checkpoint_script
            post_upload_script sdnq_weights_dtype""",
        ),
        **_off(
            (None, 0),
            """            validate_after_step validate_after_epoch
            gradient_checkpointing_segment_stride
            prodigy_steps""",
        ),
        "disk_low_script": UnsupportedKey(
            (None, ""), "write stop or wait in disk_low_action: no script is run here"
        ),
        "validation_lycoris_strength": UnsupportedKey(
            (1.0, None), "write 1.0: images are generated with the adapter at its saved strength"
        ),
        "init_lora_step": UnsupportedKey((None, 0)),
        "init_lora_ema": UnsupportedKey((None, "")),
        "peft_lora_mode": UnsupportedKey(("standard",)),
        "context_parallel_size": UnsupportedKey((1, None)),
        "sdxl_validation_pipeline_mode": UnsupportedKey(("trained-stage", None)),
        "validation_method": UnsupportedKey(("simpletuner-local", None)),
        "gradient_checkpointing_backend": UnsupportedKey(("torch", None)),
        "accelerate_visible_devices": UnsupportedKey(
            (None, ""),
            "remove it: num_processes of the hardware profile sets the number of devices, and the environment variable "
            "CUDA_VISIBLE_DEVICES selects them",
        ),
        "data_backend_sampling": UnsupportedKey(
            ("auto-weighting", None),
            'write "auto-weighting", which trains every image equally often. For datasets that are shown equally often whatever their '
            "size, give each a probability that is inverse to its number of images",
        ),
        "parquet_caption_column": UnsupportedKey(
            (None,), "write caption_column in the dataset's parquet object"
        ),
        "parquet_filename_column": UnsupportedKey(
            (None,), "write filename_column in the dataset's parquet object"
        ),
        "delete_unwanted_images": _NOTHING_IS_DELETED,
        "delete_problematic_images": _NOTHING_IS_DELETED,
        "delete_nsfw_images": _NOTHING_IS_DELETED,
        "num_processes": UnsupportedKey(
            (1, None), "remove it: num_processes of the hardware profile sets the number of devices"
        ),
        "num_machines": UnsupportedKey((1, None), "write 1: a training runs on one machine"),
        "adam_beta1": UnsupportedKey((0.9, None), _IN_OPTIMIZER_CONFIG),
        "adam_beta2": UnsupportedKey((0.999, None), _IN_OPTIMIZER_CONFIG),
        "adam_weight_decay": UnsupportedKey((0.01, None), _IN_OPTIMIZER_CONFIG),
        "adam_epsilon": UnsupportedKey((1e-8, None), _IN_OPTIMIZER_CONFIG),
        "optimizer_beta1": UnsupportedKey((None,), _IN_OPTIMIZER_CONFIG),
        "optimizer_beta2": UnsupportedKey((None,), _IN_OPTIMIZER_CONFIG),
    },
    unsupported_values={
        "model_flavour": _names("refiner-1.0 base-0.9 refiner-0.9"),
        "optimizer": _names(
            """soap muon sdnq-adamw sdnq-adamw+no_quant sdnq-adafactor sdnq-came sdnq-lion sdnq-muon
            sdnq-muon+quantized_matmul"""
        ),
        "mixed_precision": _names("fp8"),
        "validation_noise_scheduler": _names("perflow"),
        "vae_dtype": _names("fp16"),
        "prediction_type": _names("flow_matching"),
        "report_to": _names("simpletuner swanlab comet_ml custom-tracker all"),
        "caption_strategy": _names("webshart"),
        "disk_low_action": _names("script"),
    },
    inactive={
        **_tuned_by("peft_lora_mode", "singlora_ramp_up_steps"),
        **_tuned_by(
            "assistant_lora_path",
            "assistant_lora_strength assistant_lora_inference_strength disable_assistant_lora",
        ),
        **_tuned_by("distillation_method", "distillation_config"),
        **_tuned_by(
            "validation_adapter_path",
            "validation_adapter_name validation_adapter_strength validation_adapter_mode",
        ),
        **_tuned_by(
            "validation_guidance_skip_layers",
            "validation_guidance_skip_layers_start validation_guidance_skip_layers_stop validation_guidance_skip_scale",
        ),
        **_tuned_by("validation_method", "validation_external_script validation_external_background"),
        **_tuned_by(
            "sdxl_validation_pipeline_mode", "sdxl_validation_stage1_model sdxl_validation_stage2_model"
        ),
        **_tuned_by(
            "refiner_training",
            """refiner_training_invert_schedule refiner_training_strength sdxl_refiner_uses_full_range data_aesthetic_score""",
        ),
        **_tuned_by(
            "controlnet",
            "controlnet_custom_config controlnet_model_name_or_path conditioning_multidataset_sampling",
        ),
        **_tuned_by("xm_enabled", "xm_candidate_count xm_training_target xm_selection_scope xm_block_size"),
        **_tuned_by(
            "enable_nsfw_check",
            """nsfw_check_models nsfw_check_min_votes nsfw_check_backend_types nsfw_check_sample_types
            nsfw_check_video_frame_count nsfw_check_video_frame_selection nsfw_check_video_min_flagged_frames""",
        ),
        **_tuned_by(
            "urepa_enabled",
            """urepa_lambda urepa_manifold_weight urepa_model urepa_encoder_image_size urepa_use_tae urepa_scheduler
            urepa_warmup_steps urepa_decay_steps urepa_lambda_end urepa_power urepa_cutoff_step urepa_similarity_threshold
            urepa_similarity_ema_decay urepa_threshold_mode""",
        ),
        **_tuned_by("context_parallel_size", "context_parallel_comm_strategy"),
        **_tuned_by(
            "num_machines",
            "machine_rank main_process_ip main_process_port same_network local_rank",
        ),
        **_tuned_by(
            "ramtorch",
            """ramtorch_target_modules ramtorch_text_encoder ramtorch_vae ramtorch_controlnet ramtorch_transformer_percent
            ramtorch_text_encoder_percent ramtorch_disable_sync_hooks ramtorch_disable_extensions""",
        ),
        **_tuned_by(
            "enable_group_offload",
            """group_offload_type group_offload_blocks_per_group group_offload_use_stream group_offload_to_disk_path
            group_offload_text_encoder group_offload_vae""",
        ),
        **_tuned_by(
            "gradient_checkpointing_offload_attention",
            "gradient_checkpointing_offload_pin_memory_max_buckets gradient_checkpointing_offload_prefetch",
        ),
        **_tuned_by(
            "sdnq_weights_dtype",
            """sdnq_compile_mode sdnq_group_size sdnq_hadamard_group_size sdnq_modules_dtype_dict sdnq_modules_quant_config
            sdnq_modules_to_not_convert sdnq_modules_to_not_use_matmul sdnq_quantized_matmul_dtype sdnq_svd_rank sdnq_svd_steps
            sdnq_use_hadamard sdnq_use_quantized_matmul sdnq_use_static_quantization sdnq_use_stochastic_rounding sdnq_use_svd""",
        ),
    },
    ignored=_names(
        """__active_tab__ __disabled_fields__ configs_dir ez_model_type aspect_ratio_bucketing ignore_final_epochs push_to_hub_background accelerator_cache_clear_interval aspect_bucket_disable_rebuild aspect_bucket_worker_count aws_max_pool_connections
        base_model_default_dtype cache_dir cache_dir_text cache_dir_vae checkpointing_use_tempdir compress_disk_cache
        custom_text_encoder_intermediary_layers dataloader_prefetch dataloader_prefetch_qlen
        debug_aspect_buckets debug_dataset_loader delete_invalid_checkpoints delete_model_after_load diffusion_blocks_config
        disable_benchmark disable_bucket_pruning disable_tf32 enable_chunked_feed_forward
        enable_multiprocessing ema_cpu_only ema_foreach_disable eval_dataset_pooling feed_forward_chunk_size freeze_encoder_after freeze_encoder_before freeze_encoder_strategy save_text_encoder
        text_encoder_limit fsdp_auto_wrap_policy fsdp_cpu_ram_efficient_loading fsdp_limit_all_gathers fsdp_state_dict_type
        fsdp_transformer_layer_cls_to_wrap find_unused_parameters framerate
        fully_unload_text_encoder fuse_qkv_projections fused_qkv_projections i_know_what_i_am_doing ignore_missing_files
        image_processing_batch_size keep_vae_loaded
        max_grounding_entities max_workers merge_environment_config metadata_update_interval model_card_safe_for_work
        modelspec_comment musubi_block_swap_device musubi_blocks_to_swap offload_during_save offload_during_startup
        offload_param_path override_dataset_config preserve_data_backend_cache pretrained_gemma_model_name_or_path
        pretrained_grounding_model_name_or_path pretrained_t5_model_name_or_path pretrained_transformer_model_name_or_path
        pretrained_transformer_subfolder pretrained_unet_subfolder print_filenames print_sampler_statistics quantize_via
        qwen_text_encoder_model_name_or_path read_batch_size sageattention_usage seed_for_each_device set_grads_to_none sla_config
        strict_epoch_limit t5_padding text_embed_full_cache text_encoder_3_precision text_encoder_4_precision torch_num_threads
        tracker_image_layout training_scheduler_timestep_spacing tread_config unet_attention_slice vae_cache_scan_behaviour
        vae_enable_patch_conv vae_enable_slicing vae_enable_temporal_roll vae_enable_tiling validation_audio_duration
        validation_audio_only validation_guidance_real validation_image_format validation_image_quality
        validation_internal_guidance_scale validation_ltx2_video_conditioning validation_lyrics validation_multigpu
        validation_no_cfg_until_timestep validation_num_video_frames validation_seed_source validation_stitch_input_location
        validation_torch_compile variant"""
    ),
    ignored_prefixes=tuple(
        _names(
            """acestep_ audio_ cosmos3_ crepa_ deepfloyd_ flow_ flux_ hidream_ ideogram_ internal_guidance_ irepa_
            krea2_ layersync_ ltx2_ ltx_ lyrics_ minimax_ mixflow_ nextlat_ pixart_ sana_ scheduled_sampling_reflexflow sd3_ twinflow_
            wan_"""
        )
    ),
)
"""Keys beyond the fields of `TrainingSettings`."""

_ALL_STEPS = "remove it: every dataset is used from the first step to the last; or disable the entry"
_FULL_IMAGES = "remove it: each image of the column is used uncropped"
_NO_ROW_FILTER = UnsupportedKey(
    (None,),
    "remove it, and use a dataset that contains training images only: rows are not filtered here",
)

_ENTRY_SPELLINGS = {"disable": "disabled"}

IMAGES: Final = KeySchema(
    spellings={**_ENTRY_SPELLINGS, "is_regularization_data": "is_regularisation_data"},
    unsupported={
        **_off((False, None), "disable_validation"),
        **_off((None, ""), "conditioning slider_strength"),
        "train_batch_size": UnsupportedKey(
            (None, ""), "write it in config.json: all datasets share one train_batch_size"
        ),
        "huggingface": UnsupportedKey((None,), "write an object, or remove the key"),
        "filter_func": _NO_ROW_FILTER,
        "composite_image_config": UnsupportedKey((None,), _FULL_IMAGES),
        "start_epoch": UnsupportedKey((1, 0, None), _ALL_STEPS),
        "end_epoch": UnsupportedKey((None, "", 0), _ALL_STEPS),
        "start_step": UnsupportedKey((0, None), _ALL_STEPS),
        "end_step": UnsupportedKey((None, 0), _ALL_STEPS),
        "delete_unwanted_images": _NOTHING_IS_DELETED,
        "delete_problematic_images": _NOTHING_IS_DELETED,
        "delete_nsfw_images": _NOTHING_IS_DELETED,
    },
    unsupported_values={
        "type": _names("webshart memory"),
        "dataset_type": _names(
            "video audio image_embeds conditioning_image_embeds caption distillation_cache"
        ),
        "conditioning_type": _names("controlnet reference_strict reference_loose"),
        "caption_strategy": _names("webshart"),
        "metadata_backend": _names("webshart"),
    },
    inactive=_tuned_by("type", "webshart"),
    ignored=_names(
        """ignore_epochs streaming num_proc csv aws_max_pool_connections image_embeds hash_filenames preserve_data_backend_cache metadata_update_interval conditioning_image_embeds
        cache_dir_conditioning_image_embeds conditioning_image_embed_batch_size compress_cache compress_disk_cache video audio s2v
        num_frames min_frames max_frames is_i2v timestep_sampling_offset framerate default cache_dir write_batch_size"""
    ),
    ignored_prefixes=("bbox", "grounding", "memory_filesystem_", "webshart_"),
)
"""Keys beyond the fields of `ImageDataset`."""

HUGGINGFACE: Final = KeySchema(
    unsupported={
        "filter_func": _NO_ROW_FILTER,
        "composite_image_config": UnsupportedKey((None,), _FULL_IMAGES),
        "fallback_caption_column": UnsupportedKey(
            (None,), "remove it, or list all caption columns in caption_column"
        ),
        "dataset_path": UnsupportedKey((None,), "write the repository in dataset_name"),
    },
    ignored=_names(
        """auto_load cache_dir streaming num_proc file_extension width_column height_column quality_column description_column
        video_column audio_column num_frames_column fps_column lyrics_column audio_caption_fields bbox_column"""
    ),
)
"""Keys of the object `huggingface` in an image dataset beyond the fields of `HubColumns`."""

TEXT_EMBEDS: Final = KeySchema(
    spellings=_ENTRY_SPELLINGS,
    unsupported={
        "text_encoder_batch_size": UnsupportedKey(
            (None,), "write text_encoder_batch_size in config.json: it applies to all captions"
        ),
    },
    inactive=_tuned_by(
        "type",
        """aws_bucket_name aws_region_name aws_endpoint_url aws_access_key_id aws_secret_access_key aws_session_token
        aws_data_prefix aws_max_pool_connections""",
    ),
    ignored=_names(
        "hash_filenames preserve_data_backend_cache metadata_update_interval compress_cache compress_disk_cache"
    ),
    ignored_prefixes=("memory_filesystem_",),
)
"""Keys beyond the fields of `TextEmbedsDataset`."""
