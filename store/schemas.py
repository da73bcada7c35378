"""The result tables: one explicit Arrow schema each, so that a type never depends on the rows that happen to be there.

A field that is not nullable is required in every row. Times are UTC. Texts named ``*_key`` are fingerprints; columns
described as JSON hold canonical JSON text.
"""

from __future__ import annotations

import pyarrow as pa

from store.errors import MismatchError

TEXT = pa.string()
INT32, INT64 = pa.int32(), pa.int64()
FLOAT32, FLOAT64 = pa.float32(), pa.float64()


def _schema(*fields: tuple[str, pa.DataType], nullable: tuple[str, ...] = ()) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in nullable) for name, kind in fields])


TABLES: dict[str, pa.Schema] = {
    # Which prompts a study's prompt sets hold: the whole set (harmful) and its splits (harmful@test).
    "memberships": _schema(
        ("study", TEXT),
        ("prompt_set", TEXT),
        ("prompt_id", TEXT),
        ("model", TEXT),  # fingerprint
        ("row_key", TEXT),
        ("responses", TEXT),  # the condition whose generated response the row includes; null: the prompt's own row
        nullable=("responses",),
    ),
    "prompts": _schema(
        ("prompt_id", TEXT),
        ("messages", TEXT),  # JSON
        ("text", TEXT),  # the last user message
        ("response", TEXT),  # the given response, where the prompt set has one
        ("tags", TEXT),  # JSON
        nullable=("response", "tags"),
    ),
    "rows": _schema(
        ("row_key", TEXT),
        ("model", TEXT),
        ("prompt_id", TEXT),
        ("n_tokens", INT32),
        ("prompt_length", INT32),  # tokens, generation prompt included
        ("response_end", INT32),  # half-open; equals prompt_length where there is no response
        ("source", TEXT),  # prompt | given | generated
        ("generation_key", TEXT),  # of the generation that the response came from
        nullable=("generation_key",),
    ),
    "models": _schema(
        ("model", TEXT),
        ("source", TEXT),
        ("revision", TEXT),
        ("adapter", TEXT),
        ("dtype", TEXT),
        ("n_layers", INT32),
        ("d_model", INT32),
        ("family", TEXT),
        ("receipt", TEXT),  # JSON: what the site self-test measured
        nullable=("revision", "adapter", "receipt"),
    ),
    "exactness": _schema(
        ("model", TEXT),
        ("dtype", TEXT),
        ("device", TEXT),  # cpu | cuda | ...
        ("way", TEXT),  # to run the same texts; compared with all rows at once
        ("n_texts", INT64),
        ("n_equal", INT64),
        ("first_difference", FLOAT64),  # median over texts that differ: the first token that does, from 0
        ("max_new_tokens", INT32),
        nullable=("first_difference",),
    ),
    "directions": _schema(
        ("study", TEXT),
        ("direction", TEXT),  # name in the study
        ("direction_key", TEXT),
        ("model", TEXT),
        ("method", TEXT),
        ("component", TEXT),
        ("layer", INT32),
        ("position", TEXT),
        ("vector", pa.list_(FLOAT32)),  # [d_model]
        ("norm", FLOAT64),  # raw norm of the vector as the method gave it
        ("n_positive", INT64),
        ("n_negative", INT64),
        ("split_half_cosine", FLOAT64),
        ("provenance", TEXT),  # JSON
        nullable=("n_positive", "n_negative", "split_half_cosine", "provenance"),
    ),
    "cosines": _schema(
        ("study", TEXT),
        ("model", TEXT),
        ("component", TEXT),
        ("layer", INT32),
        ("direction_a", TEXT),
        ("direction_b", TEXT),
        ("direction_key_a", TEXT),
        ("direction_key_b", TEXT),
        ("position_a", TEXT),
        ("position_b", TEXT),
        ("cosine", FLOAT64),
    ),
    # Cosine of a direction at one layer with one at another.
    "alignments": _schema(
        ("study", TEXT),
        ("model", TEXT),
        *((field, TEXT) for field in ("direction_a", "direction_b", "direction_key_a", "direction_key_b")),
        *((field, TEXT) for field in ("component_a", "component_b")),
        *((field, INT32) for field in ("layer_a", "layer_b")),
        ("cosine", FLOAT64),
    ),
    # What a stage could not compute; a part for each study and stage. Layer is NULL where it is all of it.
    "failures": _schema(
        *((field, TEXT) for field in ("study", "model", "stage", "kind", "name", "cause", "remedy", "key")),
        ("layer", INT32),
        nullable=("layer", "remedy", "key"),
    ),
    # Which blocks of the three tables below a study asks for now.
    "analyses": _schema(
        ("study", TEXT),
        ("model", TEXT),
        ("kind", TEXT),  # the table
        ("analysis", TEXT),  # its name in the study
        ("block_key", TEXT),
    ),
    "explained_variance": _schema(
        ("block_key", TEXT),
        ("model", TEXT),
        ("component", TEXT),
        ("layer", INT32),
        ("rank", INT32),  # 1 is the first principal component
        ("share", FLOAT64),  # of the variance of the directions (not centred: of their mean square)
        ("low", FLOAT64),
        ("high", FLOAT64),
        ("bootstrap_mean", FLOAT64),
        ("cumulative", FLOAT64),
        ("cumulative_low", FLOAT64),
        ("cumulative_high", FLOAT64),
        ("n_directions", INT64),
        ("n_kept", INT64),  # without near-duplicates
        ("duplicates", TEXT),  # JSON: dropped direction -> the one that stands for it
        ("resamples", INT64),
        ("seed", INT64),
        ("confidence", FLOAT64),
    ),
    "cosine_nulls": _schema(
        ("block_key", TEXT),
        ("model", TEXT),
        ("component", TEXT),
        ("layer", INT32),
        ("direction_a", TEXT),
        ("direction_b", TEXT),
        ("direction_key_a", TEXT),
        ("direction_key_b", TEXT),
        ("null", TEXT),  # random | permuted_labels
        ("cosine", FLOAT64),
        ("q025", FLOAT64),  # quantiles of the null's cosines
        ("q500", FLOAT64),
        ("q975", FLOAT64),
        ("p_value", FLOAT64),  # two-sided; null where no permutation is exact, and `note` says why
        ("p_holm", FLOAT64),  # adjusted for the pairs of the layer
        ("p_bh", FLOAT64),  # the same by Benjamini and Hochberg: false discovery rate
        ("low", FLOAT64),  # 95% bootstrap interval of the cosine, units resampled (permuted_labels only)
        ("high", FLOAT64),
        ("level", TEXT),  # what is exchanged: row | group
        ("permuted", TEXT),  # JSON: the directions whose labels were permuted; of others the vector is fixed
        ("note", TEXT),
        ("draws", INT64),
        ("seed", INT64),
        nullable=("q025", "q500", "q975", "p_value", "p_holm", "p_bh", "low", "high", "level", "permuted", "note"),
    ),
    "separability": _schema(
        ("block_key", TEXT),
        ("model", TEXT),
        ("component", TEXT),
        ("layer", INT32),
        ("direction", TEXT),
        ("direction_key", TEXT),
        ("position", TEXT),
        ("n_positive", INT64),
        ("n_negative", INT64),
        ("n_training", INT64),  # evaluated prompts that the direction was computed from; 0: held out
        ("auc", FLOAT64),
        ("auc_low", FLOAT64),
        ("auc_high", FLOAT64),
        ("d_prime", FLOAT64),  # null where nothing varies
        ("d_prime_low", FLOAT64),
        ("d_prime_high", FLOAT64),
        ("resamples", INT64),
        ("seed", INT64),
        ("confidence", FLOAT64),
        nullable=("d_prime", "d_prime_low", "d_prime_high"),
    ),
    "projections": _schema(
        ("model", TEXT),
        ("row_key", TEXT),
        ("direction", TEXT),
        ("direction_key", TEXT),
        ("component", TEXT),
        ("layer", INT32),
        ("position", TEXT),
        ("projection", FLOAT64),  # h . v_hat
        ("norm", FLOAT64),  # ||h||
    ),
    "conditions": _schema(
        ("study", TEXT),
        ("model", TEXT),
        ("condition", TEXT),  # name after sweeps are expanded; unique in the study
        ("base_condition", TEXT),  # name before
        ("condition_key", TEXT),
        ("control_of", TEXT),
        ("interventions", TEXT),  # JSON
        ("coefficient", FLOAT64),  # the swept coefficient
        ("decoding_key", TEXT),
        ("decoding", TEXT),  # JSON
        nullable=("control_of", "coefficient"),
    ),
    # What each study asks to be generated. Views show this and nothing else that was ever generated.
    "replay_rows": _schema(
        ("study", TEXT),
        ("condition", TEXT),  # two conditions may do the same to different prompts
        ("condition_key", TEXT),
        ("decoding_key", TEXT),
        ("model", TEXT),
        ("row_key", TEXT),
        ("prompt_set", TEXT),
        ("prompt_id", TEXT),
        ("seed", INT64),
    ),
    "generations": _schema(
        ("generation_key", TEXT),
        ("study", TEXT),  # the one that wrote it; others may share it
        ("model", TEXT),
        ("row_key", TEXT),
        ("prompt_id", TEXT),
        ("condition_key", TEXT),
        ("decoding_key", TEXT),
        ("seed", INT64),
        ("text", TEXT),
        ("token_ids", pa.list_(INT32)),
        ("n_tokens", INT32),
        ("finish_reason", TEXT),  # stop | length
        ("code_version", TEXT),
        ("transformers_version", TEXT),
        ("torch_version", TEXT),
        ("created", pa.timestamp("us", tz="UTC")),
    ),
    "monitored": _schema(
        ("generation_key", TEXT),
        ("direction", TEXT),
        ("direction_key", TEXT),
        ("component", TEXT),
        ("layer", INT32),
        # 0: the forward at prompt_end, which chose the first token; i: the forward that read response token i - 1.
        ("token_index", INT32),
        ("projection", FLOAT32),
    ),
    # What each operation of a condition did to each text, over the tokens that were read under it.
    "intervention_effects": _schema(
        ("generation_key", TEXT),
        ("intervention", INT32),  # number of the operation in its condition: an intervention at two sites is two
        ("kind", TEXT),  # add | project_out | clamp
        ("component", TEXT),
        ("layer", INT32),
        ("n_tokens", INT32),  # that it acted on, of prompt and response
        ("change", FLOAT64),  # sum over tokens of ||dh||^2
        ("largest_share", FLOAT64),  # of `change`, in the token that changed most; null where nothing changed
        ("largest_token", INT32),  # its position in prompt and response
        ("max_relative", FLOAT64),  # largest ||dh|| / ||h|| of a token
        ("mean_relative", FLOAT64),  # mean over tokens of ||dh|| / ||h||
        nullable=("largest_share", "largest_token"),
    ),
    # Which judges a study asks for. A study without rows here shows every judge and version that scored it.
    "judges": _schema(
        ("study", TEXT),
        ("judge", TEXT),
        ("judge_version", TEXT),
        ("measures", TEXT),  # refusal | degenerate | another name
        ("options", TEXT),  # JSON
        nullable=("options",),
    ),
    # What a study chose by measuring, or states as given. Written before anything that depends on it is replayed.
    "choices": _schema(
        ("study", TEXT),
        ("model", TEXT),
        ("choice", TEXT),
        ("choice_key", TEXT),  # of all that it was made from: rule, candidates, prompts, texts, judges
        ("status", TEXT),  # chosen | otherwise (no candidate passed) | given
        ("condition", TEXT),  # the candidate that won
        ("chosen", TEXT),  # JSON: variable -> value, layers as numbers
        ("rule", TEXT),  # JSON
        ("ties", TEXT),  # which of equal candidates wins
        ("n_tied", INT64),  # candidates with the winner's rate, itself included
        ("prompt_sets", TEXT),  # JSON
        ("n_prompts", INT64),  # distinct prompts of the deciding rate
        ("against_rate", FLOAT64),  # rate under the condition that candidates are compared with
        ("against_low", FLOAT64),  # 95% Wilson interval, the prompts being the units
        ("against_high", FLOAT64),
        ("judges", TEXT),  # JSON: name -> version
        ("used_by", TEXT),  # JSON: conditions that refer to it
        nullable=("condition", "against_rate", "against_low", "against_high"),
    ),
    "choice_candidates": _schema(
        ("study", TEXT),
        ("choice", TEXT),
        ("choice_key", TEXT),
        ("condition", TEXT),
        ("condition_key", TEXT),
        ("variables", TEXT),  # JSON
        ("outcome", TEXT),
        ("rate", FLOAT64),  # mean over prompts of the share of their texts with the outcome
        ("low", FLOAT64),  # 95% Wilson interval of the rate, the prompts being the units
        ("high", FLOAT64),
        ("change", FLOAT64),  # rate minus the rate under `against`
        ("change_low", FLOAT64),  # 95% interval for paired rates (Newcombe 1998, method 10)
        ("change_high", FLOAT64),
        ("faults", TEXT),  # JSON: why it could not be chosen; [] where it could
        ("rank", INT64),
        ("is_chosen", pa.bool_()),
        ("is_tied", pa.bool_()),  # passes, with the winner's rate (the winner included)
        nullable=("low", "high", "change_low", "change_high", "is_tied"),
    ),
    # Conditions compared prompt by prompt.
    "comparisons": _schema(
        ("study", TEXT),
        ("model", TEXT),
        ("comparison", TEXT),
        ("family", TEXT),
        ("first", TEXT),
        ("second", TEXT),
        ("prompt_set", TEXT),
        ("outcome", TEXT),
        ("judge", TEXT),
        ("judge_version", TEXT),
        ("n_prompts", INT64),  # asked
        ("n_pairs", INT64),  # compared
        ("n_left_out", INT64),  # a text or score is missing on either side: left out with its partner
        ("first_repeats", INT64),  # texts per prompt: seeds, and conditions pooled
        ("second_repeats", INT64),
        ("first_rate", FLOAT64),
        ("first_low", FLOAT64),  # 95% Wilson interval, the prompts being the units
        ("first_high", FLOAT64),
        ("second_rate", FLOAT64),
        ("second_low", FLOAT64),
        ("second_high", FLOAT64),
        ("difference", FLOAT64),  # first minus second
        ("low", FLOAT64),  # 95% interval for paired rates (Newcombe 1998, method 10)
        ("high", FLOAT64),
        ("only_first", INT64),  # prompts where the outcome is more frequent in the first
        ("only_second", INT64),
        ("test", TEXT),  # the paired test: mcnemar | sign_flip (as many texts on both sides) | within_prompt (unequal)
        ("p_exact", FLOAT64),  # of the paired test
        ("p_corrected", FLOAT64),  # McNemar with continuity correction
        ("among", TEXT),  # the random conditions that the effect is ranked among
        ("n_among", INT64),  # how many they are
        ("n_as_far", INT64),  # of them, how many are at least as far from `second` as `first` is
        ("p_rank", FLOAT64),  # (1 + n_as_far) / (1 + n_among)
        ("reported", TEXT),  # which test is reported: rank where `among` is given, else paired
        ("p_reported", FLOAT64),  # p_rank or p_exact
        ("p_holm", FLOAT64),  # p_reported corrected for the family (Holm); null until all of the family is there
        ("p_bh", FLOAT64),  # the same by Benjamini and Hochberg: false discovery rate
        ("n_family", INT64),
        nullable=("p_corrected", "among", "n_among", "n_as_far", "p_rank", "reported", "p_reported", "p_holm", "p_bh"),
    ),
    "scores": _schema(
        ("generation_key", TEXT),
        ("judge", TEXT),
        ("judge_version", TEXT),
        ("value", FLOAT64),
        ("label", TEXT),
        ("detail", TEXT),
        ("error", TEXT),  # why the judge gave no value; value and label are then null
        nullable=("value", "label", "detail", "error"),
    ),
}
# Every direction that was ever computed, a block each, named by its key: an edit and its revert find it again. `study`
# and `direction` say who computed it first.
TABLES["computed_directions"] = TABLES["directions"]


def schema_of(table: str) -> pa.Schema:
    """Return a table's schema.

    Raises:
        ValueError: if there is no table of that name.
    """
    try:
        return TABLES[table]
    except KeyError:
        raise ValueError(f"there is no result table {table!r}; known: {', '.join(TABLES)}") from None


def check_schema(table: str, data: pa.Table, where: str, *, older: bool = False) -> None:
    """Accept ``data`` only if its columns are exactly the table's: names, order, types and no null where one is needed.

    With ``older``, columns that may be null may be missing: a file of an earlier version; its reader fills in nulls.

    Raises:
        MismatchError: naming the first column that differs.
    """
    expected = schema_of(table)
    wanted = [f.name for f in expected if not (older and f.nullable and f.name not in data.column_names)]
    if data.column_names != wanted:
        missing = [name for name in wanted if name not in data.column_names]
        extra = [name for name in data.column_names if name not in expected.names]
        what = f"missing {missing}, unknown {extra}" if missing or extra else f"they must be in the order {wanted}"
        raise MismatchError(f"{where}: the columns are not those of table {table}: {what}")
    for name in wanted:
        field, column = expected.field(name), data.column(name)
        if column.type != field.type:
            raise MismatchError(
                f"{where}: column {field.name} of table {table} is {column.type} and must be {field.type}; "
                f"build the table with schema=TABLES[{table!r}]"
            )
        if column.null_count and not field.nullable:
            raise MismatchError(f"{where}: column {field.name} of table {table} has {column.null_count} nulls")
