"""Cases of tests that `make test-slow` runs and the default suite leaves out.

They take seconds, and their kind is proved by cases that stay. Keys are files within `tests`, then
names of tests.
"""

Cases = tuple[str, ...]

STAY: dict[str, dict[str, Cases]] = {
    "contract/test_hostile_split.py": {
        "test_a_site_that_lies_fails_alone": ("client-batch", "sequential"),
    },
    "contract/test_split_wire.py": {
        "test_no_token_label_embedding_or_head_crosses_the_wire": (
            "client-batch-own-full",
            "hierarchical-own-lora",
            "sequential-shared-lora",
        ),
    },
    "docs/test_howto.py": {"test_audit": ()},
    "oracle/test_answers.py": {"test_scores_of_a_run_are_those_of_plain_generation": ("fedavg",)},
    "oracle/test_fedpipe_modes.py": {
        "test_a_downlink_that_loses_nothing_changes_nothing": (),
        "test_error_feedback_survives_a_change_of_rank_at_both_ends": ("residual",),
    },
    "oracle/test_flglm.py": {
        "test_resume_is_a_straight_run": ("own-client-batch", "shared-sequential"),
    },
    "oracle/test_flglm_in_flight.py": {
        "test_a_stopped_run_resumes_to_the_same_bits": ("client-batch",),
    },
    "oracle/test_flglm_leakage.py": {
        "test_a_run_says_that_an_untuned_front_gives_all_away": ("shared-all",),
        "test_leakage_is_measured_every_so_often": (),
        "test_less_is_read_under_noise": (),
    },
    "oracle/test_flglm_memory.py": {
        "test_a_cached_front_changes_no_bit": ("client-batch",),
        "test_a_memory_that_one_end_has_lost_is_dropped_at_both": (),
        "test_a_site_that_begins_again_has_the_memory_of_the_round": (),
        "test_resume_begins_with_the_memory_of_the_round": ("client-batch",),
        "test_the_error_of_changes_falls_with_the_steps": (),
    },
    "oracle/test_flglm_parts.py": {
        "test_a_chosen_cut_is_the_cut_in_numbers": ("lora",),
        "test_a_client_batch_of_mixed_parts_is_a_plain_loop": ("gpt2-full lora full",),
        "test_mixed_parts_are_a_plain_loop": ("lora lora full-llama", "frozen full lora-gpt2"),
        "test_parts_of_one_kind_are_the_run_without_parts": ("lora-adapter_sha256",),
        "test_resume_is_a_straight_run": ("client-batch-own",),
    },
    "oracle/test_flglm_quantised.py": {
        "test_a_client_batch_is_one_batch_of_the_quantised_model": ("mixed",),
    },
    "oracle/test_leakage_training.py": {"test_all_attacks_on_one_mechanism": ()},
    "oracle/test_short_answers.py": {
        "test_an_answer_does_not_depend_on_the_other_prompts": ("10-24",),
    },
    "unit/methods/flglm/test_check_rows.py": {
        "test_memory_has_a_graph_for_each_micro_batch_in_flight": ("hierarchical",),
        "test_trained_parameters_are_those_of_all_three_parts": ("own",),
    },
    "unit/runs/test_late_site.py": {
        "test_a_process_ends_while_a_late_site_still_trains": ("0",),
    },
    "unit/runs/test_run.py": {
        "test_kill_9_and_resume_gives_the_same_adapter": ("second checkpoint",),
    },
}
"""Cases that stay, where all others of the test are slow; none, where the whole test is."""

LEAVE: dict[str, dict[str, Cases]] = {
    "contract/test_methods.py": {
        "test_resume_after_every_event_is_a_straight_run": ("fedpipe lora", "flglm lora"),
    },
    "contract/test_predicted_bytes.py": {
        "test_a_run_sends_what_was_predicted": (
            "flglm, all weights",
            "flglm, all weights of the back",
            "flglm, cached front",
            "flglm, changes",
            "flglm, embedding and head",
            "flglm, own weights at the ends",
            "flglm, replicas",
        ),
    },
}
"""Cases that are slow, where all others of the test stay."""


def is_slow(file: str, test: str, case: str) -> bool:
    """Return whether a case of a test, "" where it has none, is left to `make test-slow`."""
    stay = STAY.get(file, {}).get(test)
    return case in LEAVE.get(file, {}).get(test, ()) or (stay is not None and case not in stay)
