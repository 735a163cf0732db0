"""Breakages outside core.py, with the tests that must notice each.  `make mutate WHERE=sample` (mutate.py)

Each would give other weights, figures or images without a word, or lose work. By file below src/sbrush: a text that
stands there exactly once, what is put in its place, and the tests below tests/ that must fail: files, or file::test.
"""

from __future__ import annotations

RESUMED = "test_distill.py::test_an_interrupted_run_ends_with_the_same_student_and_log"
PROMISES = "test_distill.py::test_a_run_leaves_what_it_promises"
STOPPED = "test_distill.py::test_a_stopped_run_saves_and_goes_on"
BY_HAND = "test_distill.py::test_a_step_is_the_papers_formulas_written_out"
TWO = "test_distill.py::test_gradients_of_two_processes_are_those_of_one"
SKIPPED = "test_health.py::test_skipped_steps_are_logged_and_the_means_are_of_the_others"
NOT_FINITE = "test_health.py::test_a_step_that_is_not_finite_changes_nothing_and_is_counted"
YARDSTICK = "test_health.py::test_the_yardstick_measures_what_it_says"
ANY_KIND = "test_distiller.py::test_a_run_of_any_kind_goes_on_from_its_checkpoint_exactly"
SHARES = "test_few_steps.py::test_the_first_of_several_steps_is_trained_in_its_share_of_the_steps"
ANCHOR = "test_few_steps.py::test_the_anchor_is_the_image_before_or_the_teachers_guess_from_what_the_student_sees"
OF_ITS_STEP = "test_distiller.py::test_a_checkpoint_is_the_student_of_its_step"
AS_LORA = "test_distiller.py::test_a_lora_student_is_exported_whole_and_as_a_lora_for_plain_diffusers"
IN_PARTS = "test_distiller.py::test_whatever_fits_a_run_to_its_machine_leaves_its_gradients_alone"
EXTENDED = "test_hostile.py::test_extend_adds_steps_to_a_complete_run_once"
FULL_DISK = "test_hostile.py::test_a_full_disk_is_seen_before_writing_and_the_last_checkpoint_stays"
TWO_KEPT = "test_checkpoint.py::test_the_newest_two_are_kept"
DAMAGED = "test_checkpoint.py::test_a_damaged_newest_one_is_passed_over_with_a_word"
COCO, COMMAND = "test_coco.py::TestProtocol", "test_coco.py::TestCommand"
MANIFEST = f"{COMMAND}::test_every_metric_and_every_line_of_the_manifest"
METRICS = "test_coco.py::TestMetrics"
PLAIN_DIFFUSERS = "test_models.py::test_a_student_folder_gives_the_same_image_in_plain_diffusers"
SAME_COMMAND = "test_sample_files.py::test_the_same_command_goes_on_and_the_result_is_the_same_to_the_bit"
NEVER_REPLACED = "test_sample_files.py::test_what_was_drawn_otherwise_is_never_replaced_but_by_overwrite"
LORA = "test_lora.py::test_images_are_plain_diffusers_in_every_layout"
LORA_MISFIT = "test_lora.py::test_a_lora_that_does_not_fit_is_refused_and_changes_nothing"
LORA_COMMAND = "test_lora.py::test_the_command_line_draws_with_them_and_records_them"
TURNS = "test_serve_engine.py::test_a_newer_turn_takes_the_place_of_what_its_client_waits_for"
ALLOWED = "test_serve.py::test_who_may_ask"

STEERED = "test_control.py::test_plain_diffusers_draws_the_same_image"
IN_THE_LOOP = "test_steering.py::test_a_step_with_a_controlnet_is_the_formulas_written_out"

EXPORTS = "test_export_command.py"
NAMES = f"{EXPORTS}::test_the_names_are_those_of_the_original_code"
LORA_ERROR = f"{EXPORTS}::test_a_lora_leaves_the_error_that_it_tells"
RANK = f"{EXPORTS}::test_the_rank_is_the_lowest_that_keeps_the_error_and_a_whole_lora_is_the_student"
HALF_WRITTEN = f"{EXPORTS}::test_a_disk_that_fills_up_leaves_nothing_half_written"
PERSONAL = "test_personalize.py"

BREAKAGES: dict[str, list[tuple[str, str, str]]] = {
    "models/control.py": [
        ("mid = own_mid if mid is None else mid + own_mid", "mid = own_mid", STEERED),
        ("conditioning_scale=control.scale", "conditioning_scale=1.0", STEERED),
        ("added_cond_kwargs=added", "added_cond_kwargs=added and {k: 0 * v for k, v in added.items()}", STEERED),
    ],
    "sampling/control.py": [
        ("return images.float() / 255", "return images.float() / 127.5 - 1", STEERED),
        ("        check_control(control.network, model, source)\n", "        pass\n",
         "test_control.py::test_a_teacher_of_another_base_is_not_steered"),
    ],
    "sampling/preprocess.py": [
        ("(size > beside(0, -1)) & (size >= beside(0, 1))", "(size > beside(0, -1)) & (size > beside(0, 1))",
         "test_preprocess.py::test_canny_finds_opencvs_edges_to_the_pixel"),
        ("    return ~_flood(reached, ~differs)", "    return differs",
         "test_preprocess.py::test_an_outline_is_the_edge_of_what_stands_on_the_background"),
    ],
    "training/methods/steering.py": [
        ("self._preps = [PREPROCESSORS[control.prep]", "self._preps = [PREPROCESSORS['none']", IN_THE_LOOP),
    ],
    "training/loop.py": [
        ("        method.hold(plan.held)", "        pass",
         "test_personalize.py::test_both_trainings_leave_what_they_promise_and_the_same_command_goes_on"),
        ("first = saved.step + 1", "first = saved.step", RESUMED),
        ("        method.load(saved)\n", "", RESUMED),
        ("range(first, recipe.steps + 1)", "range(first, recipe.steps)", PROMISES),
        ("(step % every.grid == 0 or last or step == 1)", "(step % every.grid == 0)", PROMISES),
        ("save = saving.due(step) or last or stopping", "save = saving.due(step) or last", STOPPED),
        ("if needed and save and (skipped == 0 or last or stopping)", "if needed and save",
         "test_health.py::test_many_of_them_in_a_row_stop_the_run_with_its_last_good_checkpoint"),
        ("before = before + 1 if skipped else 0", "before = before + 1 if skipped else before",
         "test_health.py::test_steps_that_are_skipped_here_and_there_do_not_stop_a_run"),
        ("values.isfinite()", "torch.ones_like(values, dtype=torch.bool)", SKIPPED),
        ("                waiting, since = [], time.monotonic()\n", "", SKIPPED),
        ("* SAVING >= self._took * (1 - SAVING)", ">= self._took * (1 - SAVING)",
         "test_distill.py::test_checkpoints_come_as_often_as_they_are_worth"),
        ("            signal.signal(s, handler)", "            pass",
         "test_distill.py::test_the_first_signal_asks_and_the_handlers_come_back"),
    ],
    "training/run.py": [
        ('if entry["step"] <= after_step', 'if entry["step"] <= after_step + 1', RESUMED),
        ("steps=recipe.steps + sum(added)", "steps=recipe.steps", EXTENDED),
        ("not now.complete and before[-1:] == [extend]", "before[-1:] == [extend]", EXTENDED),
        ('about["recipe"]["steps"] == self.recipe.steps', 'about["recipe"]["steps"] > 0', EXTENDED),
        ("seed for seed in range(1, GRID_SEEDS + 1) for _ in chosen",
         "seed for _ in chosen for seed in range(1, GRID_SEEDS + 1)",
         "test_few_prompts.py::test_a_row_of_a_grid_is_a_seed_and_a_column_a_prompt"),
    ],
    "training/health.py": [
        ("channels.mean(1) - mean) / deviation", "channels.mean(1) - mean)", YARDSTICK),
        ("(channels - mean[:, None]).abs() > furthest[:, None]", "channels.abs() > furthest[:, None]", YARDSTICK),
        ("for dim in (1, 0))", "for dim in (0, 1))", YARDSTICK),
        ("and all(signs)", "and any(signs)", "test_health.py::test_a_sign_must_last_and_the_first_steps_do_not_count"),
    ],
    "training/ema.py": [
        ("self.decay, (1 + step) / (10", "self.decay, step / (10", "test_ema.py"),
        ("            self._moving.result()\n", "", "test_ema.py"),
        ("            self.tensors[name].copy_(own)\n", "", "test_ema.py"),
        ("_foreach_lerp_(averages, now, 1 - decay)", "_foreach_lerp_(averages, now, decay)", "test_ema.py"),
        ("(averages, copies, share)", "(averages, copies, 1 - share)", "test_ema.py"),
    ],
    "training/optimizer.py": [
        ("(~norm.isfinite()).float()", "torch.zeros_like(norm)", NOT_FINITE),
        ('            put(v, tensors[f"{i}.{k}"])\n', "            pass\n",
         "test_checkpoint.py::test_a_resumed_optimiser_goes_on_bit_for_bit"),
        ('group["params"]], clip))', 'group["params"]], 1e9))', "test_optimizer.py"),
        ("    optimizer.zero_grad(set_to_none=True)\n", "", "test_optimizer.py"),
    ],
    "training/networks.py": [
        ("            average_gradients(parameters.values(), self.accelerator)\n", "            pass\n", TWO),
        ('parts["student_optimizer"] = optimizer.state_of(self.student_optimizer)',
         'parts["student_optimizer"] = {}', ANY_KIND),
        ("with self.ema.inside(), self.accelerator", "with self.accelerator", OF_ITS_STEP),
        ("self.teacher.as_student(self.scheduler, about)", "self.teacher.as_student(self.teacher.scheduler, about)",
         "test_few_prompts.py::test_a_grid_is_drawn_as_the_student_will_be"),
        ("seed=seed + 1)", "seed=seed)", "test_distiller.py::test_the_two_loras_of_a_run_start_apart"),
        ("                sharding.put(tensor, theirs[name])\n", "                pass\n", RESUMED),
        ("if not all(v.isfinite().all() for v in theirs.values()):", "if False:",
         "test_distiller.py::test_a_checkpoint_with_numbers_that_are_none_is_refused"),
    ],
    "onnx/model.py": [
        ("    tokenizer.enable_truncation(length)\n", "",
         "test_onnx.py::test_prompts_are_read_as_transformers_reads_them"),
        ('configuration_digest(read_json(places[own] / own / "config.json")) != graphs[part]["configuration"]', "False",
         "test_onnx.py::test_the_graphs_are_those_of_the_networks_of_today"),
        ("whole.update(hashlib.file_digest(opened, \"sha256\").digest())", "pass",
         "test_onnx.py::test_weights_tell_students_apart"),
        ('timestep=t[0]', 'timestep=t[0] - 100',
         "test_onnx.py::test_the_built_in_student_draws_the_same_with_both_runtimes"),
    ],
    "onnx/decoder.py": [
        ('about.get("world") != "stickers"', "False",
         "test_onnx.py::test_an_exported_student_of_the_built_in_world_takes_the_tiny_vae_and_another_does_not"),
        ("if graphs[part][\"configuration\"] == digest", "if True",
         "test_vae.py::test_the_built_in_vae_as_a_folder_is_no_other_vae"),
        ("{key: config[key] for key in VAE_FACTS if key in config}", '{"scaling_factor": 0.46325}',
         "test_vae.py::test_the_built_in_world_has_its_own"),
    ],
    "models/load_vae.py": [
        ("    _check_fit(vae, model, shown)\n", "", "test_vae.py::test_one_of_other_latents_is_refused"),
        ("factors = (own.scaling_factor, 1.0) if tiny else (own.scaling_factor,)",
         "factors = (own.scaling_factor, config.scaling_factor)",
         "test_vae.py::test_so_is_an_autoencoder_of_another_scale"),
        ("own = PUBLISHED[model.pipeline]", 'own = PUBLISHED["StableDiffusionPipeline"]',
         "test_vae.py::test_the_published_ones_go_with_their_family_alone"),
    ],
    "models/model.py": [
        ("        vae = self.decoding_vae\n", "        vae = self.vae\n",
         "test_vae.py::test_the_image_is_that_of_plain_diffusers_with_this_vae"),
        ("            step += (self.decoder.sha256,)\n", "            pass\n",
         "test_vae.py::test_the_built_in_world_has_its_own"),
    ],
    "sampling/opening.py": [
        ("plain = start_timestep is None and", "plain =", "test_onnx.py::test_onnx_is_refused_where_it_has_no_graphs"),
    ],
    "training/methods/vsd.py": [
        ("return step > self.recipe.lora_lead or", "return step > 0 or",
         "test_distill.py::test_the_lora_teacher_may_learn_alone_at_first"),
        ("core.vsd_loss(x0, gap) if step > recipe.lora_lead else", "core.vsd_loss(x0, gap) if step > 0 else", ANCHOR),
        ("partial(self.teachers.score, x, t, cond, scores.scale)",
         "partial(self.teachers.lora_score, x, t, cond, images.rung, scores.scale)", ANCHOR),
        ("(step - 1) * recipe.batch + i", "step * recipe.batch + i", BY_HAND),
        ("        self.ema.update(step)\n", "", OF_ITS_STEP),
        ("+ recipe.hold_weight * metrics", "+ 0.0 * metrics",
         "test_holding.py::test_a_student_that_is_held_leaves_its_images_less"),
        ("len(z) / len(x0) * metrics", "1.0 * metrics",
         "test_distill.py::test_pairs_hold_some_samples_to_the_teachers_own_images_of_their_noise"),
        ("loss / len(self._micro_batches)", "loss", IN_PARTS),
        ("recipe.anchor_weight_at(step, images.rung)", "recipe.anchor_weight", ANCHOR),
        ("return 0 if draw.chance(share) else 1 +", "return", SHARES),
    ],
    "training/methods/rehearsal.py": [
        ("(1 - first) * recipe.student_steps / 2", "(recipe.student_steps - 1) / 2",
         "test_few_steps.py::test_the_plan_counts_the_simulated_forwards"),
        ("first + (1 - first) * teacher", "teacher", "test_few_steps.py::test_the_plan_counts_the_simulated_forwards"),
    ],
    "training/recipes.py": [
        ("left = 1.0 if rung else", "left =", ANCHOR),
    ],
    "training/methods/teachers.py": [
        ("torch.where(t <= high, scale, 1.0)", "torch.where(t <= t, scale, 1.0)", f"{ANCHOR} test_distill.py"),
        ('score("lora_teacher", x_t, t, told', 'score("lora_teacher", x_t, t, (cond, self.null_of(cond))',
         "test_few_steps.py::test_the_lora_teacher_learns_a_token_of_the_rung_in_hand_and_the_teacher_is_told_nothing"),
        ('for name in ("control",)', "for name in ()", IN_THE_LOOP),
    ],
    "storage/checkpoint.py": [
        ("<= step][keep:]", "<= step][keep + 1:]", TWO_KEPT),
        ("key=step_of, reverse=True", "key=step_of", f"{TWO_KEPT} {DAMAGED}"),
        ('if digest != _digest(path / f"{part}.safetensors")', "if False", DAMAGED),
        ('if extra.pop("step") != step_of(path)', 'if extra.pop("step") is None',
         "test_checkpoint.py::test_one_of_another_step_than_its_name_says_is_passed_over"),
        ('check_room(folder, size, "a checkpoint"', 'check_room(folder, 0, "a checkpoint"',
         "test_checkpoint.py::test_room_is_looked_for_before_anything_is_written"),
    ],
    "storage/files.py": [
        ("                partial.replace(target)\n", "                shutil.copyfile(partial, target)\n",
         "test_files.py"),
        ("                old.rename(folder)\n", "                pass\n",
         "test_locks.py::test_a_folder_that_cannot_take_its_place_leaves_the_old_one"),
        ("file.chmod(0o666 & ~umask)", "file.chmod(0o644)",
         "test_export.py::test_everything_that_is_written_follows_the_umask"),
        ("if problem.errno not in CANNOT_FLUSH:", "if False:",
         "test_locks.py::test_a_disk_that_fails_in_flushing_is_not_passed_over"),
        ("allow_nan=False", "allow_nan=True", "test_files.py"),
    ],
    "storage/shards.py": [
        ("self.blocks[process::processes]", "self.blocks[process:]", "test_coco.py::TestShards"),
        ("return lengths == {len(block)}", "return bool(lengths)", "test_coco.py::TestShards"),
        ("row = place - block.start", "row = place", "test_text_cache.py"),
    ],
    "noise.py": [
        ("generator(seed, step, index)", "generator(seed, index)", "test_seeds.py"),
        ("torch.randint(low, high + 1,", "torch.randint(low, high,", "test_seeds.py"),
        ('_number(seed, step, "batch")', '_number(seed, "batch")',
         "test_distill.py::test_a_random_guidance_scale_is_one_for_the_step_and_for_both_scores"),
        ("manual_seed(seed) for seed in seeds]", "manual_seed(seed + 1) for seed in seeds]", "test_seeds.py"),
    ],
    "sampling/seeds.py": [
        ("range(first, last + 1)", "range(first, last)", "test_seeds.py"),
        ("int(found[2] or found[1])", "int(found[1])", "test_seeds.py"),
    ],
    "prompts/__init__.py": [
        ('generator(seed, "epoch", epoch)', 'generator(seed, "epoch")', "test_prompts.py"),
        ("tuple(dict.fromkeys(filled))", "tuple(filled)", "test_prompts.py"),
        ('if texts.unit == "line" and not stripped[-1]:', "if not stripped[-1]:", "test_prompt_tables.py"),
    ],
    "prompts/delimited.py": [
        ("+= [None] * blank + [", "+= [", "test_prompt_tables.py test_gallery.py"),
        ("inner.replace('\"\"', '\"') if enclosed", "inner if enclosed", "test_prompt_tables.py"),
    ],
    "metrics/fid.py": [
        ("(groups - 1) / groups *", "1 / groups *", METRICS),
        ("(products - n * mean.outer(mean)) / (n - 1)", "(products - n * mean.outer(mean)) / n", METRICS),
        ("self._metric.update(part.double(), real=real)", "self._metric.update(part.double(), real=True)", METRICS),
    ],
    "metrics/kid.py": [
        ("(m * (m - 1))", "(m * m)", METRICS),
        ("return within - 2 * xy.mean()", "return within - xy.mean()", METRICS),
        ("b.T / x.shape[1] + 1", "b.T + 1", METRICS),
    ],
    "metrics/precision_recall.py": [
        ("columns) <= reach[columns]", "columns) < reach[columns]", "test_evaluate.py"),
        ("approximate[own, own + first] = torch.inf  # not itself", "pass", "test_evaluate.py"),
        ("share * (norms[:, None] + self._largest)", "0 * (norms[:, None] + self._largest)", "test_evaluate.py"),
        ("return precision, coverage(fake, real,", "return precision, coverage(real, fake,", "test_evaluate.py"),
    ],
    "metrics/clip.py": [
        ("[prefix + caption for caption in captions]", "[caption for caption in captions]", COCO),
        ("int(tokens.argmax(dim=1).max()) + 1", "int(tokens.argmax(dim=1).max())", COCO),
    ],
    "metrics/inception.py": [
        ("((x - 128) / 128)", "(x / 128 - 0.99)", COCO),
        ("Image.Resampling.BICUBIC", "Image.Resampling.BILINEAR", COCO),
    ],
    "metrics/diversity.py": [
        ("getattr(caption, name) is None", "getattr(caption, name) is not None", "test_evaluate.py::TestDiversity"),
        ("correction=0)", "correction=1)", "test_evaluate.py::TestDiversity"),
    ],
    "evaluate/coco/protocols.py": [
        ("first.setdefault(", "first.__setitem__(", COCO),
        ('cast="truncate"', 'cast="round"', "test_protocols.py"),
    ],
    "evaluate/coco/features.py": [
        ('round(spare / 2) if crop == "half to even" else spare // 2', "spare // 2", "test_protocols.py"),
        ('captions, "")', 'captions, "a ")',
         f"{COMMAND}::test_hps_is_the_cosine_without_prefix_of_the_image_at_its_own_size"),
        ("captions[first : first + len(images)])\n", "captions[: len(images)])\n", "test_prefetch.py"),
        ("torch.tensor([isinstance(image, UnreadableImage) for image in images])", "torch.zeros(len(images)).bool()",
         f"{COMMAND}::test_a_corrupt_image"),
    ],
    "evaluate/coco/measurement.py": [
        ("self.seed * 1_000_000 + number", "self.seed + number", MANIFEST),
        ("scores.argsort()[:WORST]", "scores.argsort(descending=True)[:WORST]", MANIFEST),
        ("self.seed, hash_of(self.captions)]", "self.seed]", f"{COMMAND}::test_captions_beside_the_images"),
        ("hash_of(self.listing), hash_of(times)]", "hash_of(self.listing)]", f"{COMMAND}::test_a_corrupt_image"),
        ('rows["clip"][valid].mean()', 'rows["clip"].mean()',
         f"{COMMAND}::test_a_corrupt_image_among_those_to_measure"),
        ("for block in blocks:\n            yield from", "for block in blocks[:1]:\n            yield from",
         "test_measurement.py"),
    ],
    "evaluate/coco/gallery.py": [
        ("sorted(zip(places, self.files, strict=True))", "list(zip(places, self.files, strict=True))",
         "test_gallery.py"),
    ],
    "sampling/image_folder.py": [
        ("starts=(0, 1) if whole else (0,)", "starts=(0, 1)", "test_gallery.py"),
        ("return [place[name] for name in wanted]", "return list(place.values())", "test_gallery.py"),
    ],
    "sampling/prefetch.py": [
        ("started.popleft()]\n        while", "started.pop()]\n        while", "test_prefetch.py"),
        ("workers.shutdown(cancel_futures=True)", "workers.shutdown(wait=False)", "test_prefetch.py"),
    ],
    "models/snapshot.py": [
        ("targets=lora_targets(tensors)", 'targets="blocks"',
         f"{PERSONAL}::test_a_checkpoint_of_a_lora_on_cross_attention_alone_can_be_drawn_from"),
    ],
    "benchmarks/results/making.py": [
        ("key=lambda job: -job.seconds", "key=lambda job: job.seconds",
         "test_results.py::test_the_same_minutes_are_had_from_the_rates_of_the_fastest_seed"),
    ],
    "models/unet.py": [
        ("if wrong or not names:", "if False:", "test_senseless_settings.py"),
    ],
    "cli/distill.py": [
        ("        if name in seen:", "        if False:", "test_senseless_settings.py"),
        ('({"gap"} if sds else set())', "set()", "test_senseless_settings.py"),
    ],
    "sampling/editing.py": [
        ("if not anew.any():", "if False:", "test_editing.py"),
    ],
    "models/schedule.py": [
        ("return timesteps[:steps].long()", "return timesteps.long()", "test_schedule.py"),
        ("teacher.betas[: t_init + 1]", "teacher.betas[:t_init]",
         "test_few_prompts.py::test_a_grid_is_drawn_as_the_student_will_be"),
        ("own.config.num_train_timesteps - 1", "own.config.num_train_timesteps // 2", "test_schedule.py"),
        ("{**own, **known}", "{**known, **own}", "test_schedule.py"),
    ],
    "models/export.py": [
        ("* module.scaling[role]", "", AS_LORA),
        ("cast(name, t, dtype) if t.is_floating_point() else t", "t", PLAIN_DIFFUSERS),
        ("{published_name(part, name): place for", "{name: place for",
         "test_export.py::test_text_encoders_have_their_published_names_whoever_saved_the_teacher"),
    ],
    "models/merge.py": [
        ("others[name].data, 1 - share", "others[name].data, share", "test_merge.py"),
    ],
    "models/latents.py": [
        ("x0 * std / scale + mean", "(x0 + mean) * std / scale",
         "test_configurations.py::test_a_folder_drawn_at_random_gives_the_image_of_diffusers_own_pipeline"),
        (".mul(255).round().to(", ".mul(255).to(", "test_protocols.py::test_dmd2s_protocol_alone_truncates"),
    ],
    "models/load.py": [
        ("_with_loras(load_student(source, start_timestep=start_timestep), loras",
         "_with_loras(load_student(source, start_timestep=start_timestep, dtype=dtype), loras",
         "test_lora.py::test_bfloat16_gets_the_rounded_sum"),
        ("    if not model.loras:\n", "    if True:\n",
         "test_lora.py::test_what_an_evaluation_caches_and_reports_depends_on_them"),
        ("noise_scale(config) if student else 1.0", "1.0", "test_schedule.py"),
        ('{**table, **ONE_STEP} if student else table', "table",
         "test_configurations.py::test_a_students_scheduler_that_leaves_noise_is_refused_and_a_teachers_is_replaced"),
        ("    if digest(teacher) != sha256:\n", "    if False:\n",
         "test_distiller.py::test_a_checkpoint_without_its_teacher_or_its_bytes_is_refused"),
    ],
    "sampling/generation.py": [
        ("guide(cond_output, null_output, guidance)", "guide(null_output, cond_output, guidance)",
         "test_sample.py::test_the_teachers_steps_are_plain_diffusers_ddim"),
        ("student.noise_scale * noises[0]", "noises[0]", "test_schedule.py"),
    ],
    "sampling/targets.py": [
        ("index // len(self.seeds) + 1", "index // len(self.seeds)",
         "test_sample_files.py::test_a_name_tells_place_prompt_and_seed"),
        ("divmod(index, len(self.seeds))", "divmod(index, len(self.prompts))",
         "test_sample_files.py::test_a_name_tells_place_prompt_and_seed"),
        ("if record.get(key) != value]", "if record.get(key, value) != value]",
         "test_sample_files.py::test_a_file_of_other_origin_is_never_replaced"),
        ("        if len(encoded) + len(code) > SLUG:\n            break\n", "", "test_sample_files.py"),
    ],
    "models/lora.py": [
        ("            module.scale_layer(weight)\n", "", LORA),
        ('"network_alphas": file.alphas', '"network_alphas": None', LORA),
        ("            _remove(network)\n", "            pass\n", LORA),
        ('"metadata": file.settings', '"metadata": None',
         "test_lora.py::test_sdxl_blocks_by_kohyas_own_numbers_and_diffusers_own_settings"),
        ("    if names:\n", "    if False:\n", LORA_MISFIT),
        ("not tensor.float().isfinite().all()", "False", LORA_MISFIT),
        ("model.loras + added", "model.loras", LORA_COMMAND),
    ],
    "models/lora_request.py": [
        ("weight = _number(tail) if colon and not _exists(text) else None", "weight = _number(tail) if colon else None",
         "test_lora.py::test_names_with_colons"),
    ],
    "sampling/artist.py": [
        ('"vae": self.student.decoder.about if self.student.decoder else None', '"vae": None',
         "test_vae.py::test_a_folder_of_images_goes_on_with_the_vae_that_began_it"),
        ("[lora.about for lora in self.student.loras] or None", "None", LORA_COMMAND),
        ("loras = [lora.request for lora in student.loras]", "loras = ()",
         "test_lora.py::test_the_teacher_beside_it_gets_the_same"),
    ],
    "serving/engine.py": [
        ("if len(requests) > self._most:", "if False:", "test_serve_engine.py"),
        ("if turn.number < self._turns.get(turn.client, turn.number):", "if False:", TURNS),
        ("older = self._older(waiting, turn) if turn else []", "older = []", TURNS),
        ("place = waiting.index(older[0]) if older else len(kept)", "place = len(kept)", TURNS),
        ("if len(kept) + len(requests) > self._most:", "if len(kept) >= self._most:",
         "test_serve_engine.py::test_a_queue_has_a_bound_and_takes_all_of_a_request_or_none"),
        ("same = not taken or job.request.settings == taken[0].request.settings", "same = True",
         "test_serve_engine.py::test_what_waits_is_drawn_together_if_its_settings_are_the_same"),
    ],
    "serving/guard.py": [
        ('return not foreign or headers.get("sec-fetch-mode") == "navigate"', "return True", ALLOWED),
        ('return origin.partition("://")[2] == host or origin in self._access.origins', "return True", ALLOWED),
        ("        if not self._is_known(host):", "        if not host:", ALLOWED),
        ("if path not in OPEN and not self._has_key(headers):", "if False:", ALLOWED),
        ("                if len(body) > LARGEST_BODY:", "                if False:",
         "test_serve.py::test_bodies_that_are_too_large_or_packed"),
    ],
    "serving/service.py": [
        ("if self.log_prompts:", "if True:", "test_serve.py::test_prompts_are_logged_only_if_asked"),
    ],
    "exports/lora.py": [
        ("eigenvectors[:, -rank:]", "eigenvectors[:, :rank]", LORA_ERROR),
        ("error**2 * left[0]", "error * left[0]", RANK),
        ("((left + others) / everything)", "(left / everything)", RANK),
    ],
    "exports/single_file.py": [
        ("        tensors[V] = torch.zeros(0)\n", "        pass\n", f"{EXPORTS}::test_a_file_says_that_it_predicts_v"),
        ("hidden_act == OPEN_CLIP", "hidden_act != OPEN_CLIP", NAMES),
    ],
    "exports/export.py": [
        ("    with atomic_folder(folder) as partial:\n", "    partial = folder\n    partial.mkdir()\n    if True:\n",
         HALF_WRITTEN),
        ("        check_hub(request.out)\n", "        pass\n",
         "test_export_hub.py::test_without_a_token_or_a_connection_nothing_is_tried"),
    ],
    "models/original.py": [
        ('f"up.{levels - 1 - int(m[1])}.block"', 'f"up.{int(m[1])}.block"', NAMES),
        ("{1 + (block in attentions)}.conv", "1.conv", NAMES),
        ('(prefix + theirs, (name,), "convolution")', "(prefix + theirs, (name,))", NAMES),
    ],
    "training/methods/dreambooth.py": [
        ("(alpha * noise - sigma * x0)", "(alpha * noise + sigma * x0)", f"{PERSONAL}::test_the_loss_is_the_formula"),
    ],
    "training/methods/holding.py": [
        ("if rung > 0 or self._before is None:", "if True:", ANCHOR),
        ("[recipe.batch + i for i in chosen]", "chosen",
         "test_holding.py::test_the_loss_is_the_distance_from_what_the_student_drew_of_samples_beyond_the_batch"),
        ("indices.start * recipe.hold // recipe.batch", "0",
         "test_holding.py::test_micro_batches_hold_the_same_samples"),
    ],
    "training/moving.py": [
        ("(photo - colour, scale", "(photo, scale",
         "test_moving.py::test_the_subject_is_whole_elsewhere_in_another_size_on_its_own_background"),
        ("< EVEN:", "< 0:", "test_moving.py::test_the_subject_is_what_is_before_a_plain_background"),
    ],
    "training/photos.py": [
        (" if self.move else photo", "",
         "test_moving.py::test_rows_of_a_photo_differ_if_they_are_moved_and_only_then"),
        ("self.files[row % len(self.files)]", "self.files[0]",
         f"{PERSONAL}::test_rows_are_the_photos_in_turn_and_then_the_students_images"),
    ],
    "training/personal.py": [
        ("            hold=HoldRequest(self.student, make_prompts(practice.others, practice.source)),\n", "",
         f"{PERSONAL}::test_both_trainings_leave_what_they_promise_and_the_same_command_goes_on"),
        ("t_init=None if start == len(teacher.schedule) - 1 else start", "t_init=None",
         f"{PERSONAL}::test_the_second_training_goes_on_as_the_student_was_trained"),
    ],
}  # fmt: skip
