"""The questions that the report asks; each is printed on the page, so that a reader can ask it again."""

from __future__ import annotations

SHOWN = 4  # prompts whose texts are shown
OF_STUDY = "study = {study} AND model = {model}"
CONDITIONS = f"""\
SELECT condition, base_condition, coefficient, control_of, interventions, decoding
FROM conditions WHERE {OF_STUDY}"""  # no ORDER BY: the table is written in the study's order
PROMPT_SETS = f"""\
SELECT prompt_set, responses, count(DISTINCT prompt_id) AS prompts, count(DISTINCT nullif(row_key, '')) AS rows
FROM memberships WHERE {OF_STUDY} GROUP BY ALL ORDER BY ALL"""
MODEL = "SELECT * FROM models WHERE model = {model}"
VERSIONS = f"""\
SELECT code_version, transformers_version, torch_version, count(*) AS texts, min(created) AS first, max(created) AS last
FROM generations WHERE {OF_STUDY} GROUP BY ALL ORDER BY ALL"""
RATES = f"""\
SELECT prompt_set, condition, judge, judge_version, n, n_prompts, n_seeds, n_generated, n_scored, n_refused,
    rate, low, high
FROM refusal_rates WHERE {OF_STUDY} ORDER BY ALL"""
TEXT_FACTS = f"""\
SELECT prompt_set, condition, count(*) AS texts, avg(n_tokens) AS tokens,
    avg(CAST(finish_reason = 'length' AS INT)) AS cut, avg(CAST(degenerate AS INT)) AS degenerate
FROM generations LEFT JOIN (
    SELECT generation_key, bool_or(degenerate) AS degenerate FROM labels WHERE {OF_STUDY} GROUP BY ALL
) USING (generation_key)
WHERE {OF_STUDY} GROUP BY ALL ORDER BY ALL"""
OTHER_SCORES = f"""\
SELECT prompt_set, condition, judge, measures, n, n_scored, mean, low, high, unsafe,
    wilson_low(n_unsafe, n_scored) AS unsafe_low, wilson_high(n_unsafe, n_scored) AS unsafe_high
FROM (
    SELECT prompt_set, condition, judge, measures, any_value(n) AS n, count(value) AS n_scored, avg(value) AS mean,
        quantile_cont(value, 0.1) AS low, quantile_cont(value, 0.9) AS high,
        count(*) FILTER (WHERE label = 'unsafe') AS n_unsafe,
        CASE WHEN measures = 'unsafe' AND count(value) > 0 THEN n_unsafe / count(value) END AS unsafe
    FROM (SELECT * REPLACE (CASE WHEN error IS NULL THEN value END AS value,
            CASE WHEN error IS NULL THEN label END AS label)
        FROM scores WHERE {OF_STUDY} AND measures NOT IN ('refusal', 'degenerate'))
    JOIN (SELECT prompt_set, condition, count(*) AS n FROM generations WHERE {OF_STUDY} GROUP BY ALL)
        USING (prompt_set, condition)
    GROUP BY prompt_set, condition, judge, measures) ORDER BY ALL"""
COSINES = f"""\
SELECT direction_a, direction_b, component, layer, cosine
FROM cosines WHERE {OF_STUDY} AND direction_a <> direction_b ORDER BY component, direction_a, direction_b, layer"""
ALIGNMENTS = f"""\
SELECT direction_a, direction_b, component_a, component_b, layer_a, layer_b, cosine
FROM alignments WHERE {OF_STUDY} ORDER BY ALL"""
COSINE_NULLS = f"""\
SELECT component, direction_a, direction_b, layer, "null", cosine, q025, q500, q975, p_value, p_holm, draws
FROM cosine_nulls WHERE {OF_STUDY} ORDER BY ALL"""
EXPLAINED_VARIANCE = f"""\
SELECT analysis, component, layer, rank, share, low, high, bootstrap_mean, cumulative, cumulative_low,
    cumulative_high, n_directions, n_kept, duplicates, resamples
FROM explained_variance WHERE {OF_STUDY} ORDER BY ALL"""
SEPARABILITY = f"""\
SELECT analysis, position, direction, layer, n_positive, n_negative, n_training, held_out, auc, auc_low, auc_high,
    d_prime, d_prime_low, d_prime_high
FROM separability WHERE {OF_STUDY} ORDER BY ALL"""
DIRECTIONS = f"""\
SELECT direction, method, component, position, layer, norm, n_positive, n_negative, split_half_cosine
FROM directions WHERE {OF_STUDY}"""  # no ORDER BY: the table is written in the study's order
PROJECTED = f"""\
WITH members AS (
    SELECT DISTINCT prompt_set || coalesce(' + text of ' || responses, '') AS prompts, row_key
    FROM memberships WHERE {OF_STUDY} AND row_key <> '' AND {{chosen}}
), projected AS (
    SELECT named.direction, position, layer, prompts, row_key, min(projection) AS projection
    FROM projections
    JOIN (SELECT DISTINCT direction, direction_key, component, layer FROM directions WHERE {OF_STUDY}) AS named
        USING (direction_key, component, layer)
    JOIN members USING (row_key)
    WHERE model = {{model}} GROUP BY ALL
), whole AS (  -- a set of which only a part is projected would be misread as all of it
    SELECT prompts FROM members LEFT JOIN (SELECT DISTINCT prompts, row_key, 1 AS found FROM projected)
        USING (prompts, row_key)
    GROUP BY prompts HAVING count(*) = count(found)
)"""
PROJECTIONS = (
    PROJECTED
    + """
SELECT direction, position, layer, prompts, count(*) AS n, avg(projection) AS mean,
    quantile_cont(projection, 0.1) AS low, quantile_cont(projection, 0.9) AS high
FROM projected JOIN whole USING (prompts) GROUP BY ALL ORDER BY ALL"""
)
AUROC = (
    PROJECTED
    + """, pairs AS (  -- two sets that share a row are not compared
    SELECT a.prompts AS set_a, b.prompts AS set_b FROM whole AS a CROSS JOIN whole AS b
    WHERE list_position({order}, a.prompts) < list_position({order}, b.prompts) AND NOT EXISTS (
        SELECT 1 FROM members AS x JOIN members AS y USING (row_key)
        WHERE x.prompts = a.prompts AND y.prompts = b.prompts)
), ranked AS (  -- ties share the mean of their ranks
    SELECT direction, position, layer, set_a, set_b, prompts = set_a AS in_a,
        rank() OVER (PARTITION BY direction, position, layer, set_a, set_b ORDER BY projection)
        + (count(*) OVER (PARTITION BY direction, position, layer, set_a, set_b, projection) - 1) / 2 AS place
    FROM pairs JOIN projected ON prompts IN (set_a, set_b)
)
SELECT direction, position, set_a, set_b, layer, count(*) FILTER (in_a) AS n_a, count(*) FILTER (NOT in_a) AS n_b,
    (sum(place) FILTER (in_a) - n_a * (n_a + 1) / 2) / (n_a * n_b) AS auroc
FROM ranked GROUP BY ALL HAVING n_a > 0 AND n_b > 0 ORDER BY ALL"""
)
MONITORED = f"""\
WITH shown AS (
    SELECT generation_key, prompt_set, condition FROM generations WHERE {OF_STUDY}
), deepest AS (
    SELECT direction, component, max(layer) AS layer FROM monitored JOIN shown USING (generation_key) GROUP BY ALL
)
SELECT direction, component, layer, prompt_set, condition, token_index, avg(projection) AS projection, count(*) AS n
FROM monitored JOIN deepest USING (direction, component, layer) JOIN shown USING (generation_key)
GROUP BY ALL ORDER BY ALL"""
TEXTS = f"""\
WITH shown AS (
    FROM generations WHERE {OF_STUDY}
), sets AS (
    SELECT prompt_set, count(DISTINCT condition) AS conditions FROM shown GROUP BY ALL
), chosen AS (  -- by hash, so not by anything that a reader could be misled with; sets with the most conditions first
    SELECT prompt_set, prompt_id, row_number() OVER (PARTITION BY prompt_set ORDER BY md5(prompt_id)) AS place
    FROM (SELECT DISTINCT prompt_set, prompt_id FROM shown)
    JOIN sets USING (prompt_set) WHERE conditions = (SELECT max(conditions) FROM sets)
    ORDER BY place, prompt_set LIMIT {SHOWN}
), verdicts AS (
    SELECT generation_key, list(DISTINCT coalesce(verdict, CASE WHEN refusal THEN 'refusal' WHEN NOT refusal
        THEN 'no refusal' ELSE 'unscored' END) || ' (' || coalesce(refusal_judge, 'no judge') || ')') AS verdicts
    FROM labels WHERE {OF_STUDY} GROUP BY ALL
)
SELECT prompt_set, prompt_id, messages, condition, seed, shown.text, finish_reason, n_tokens, verdicts
FROM shown JOIN chosen USING (prompt_set, prompt_id)
    LEFT JOIN (SELECT prompt_id, messages FROM prompts) USING (prompt_id) LEFT JOIN verdicts USING (generation_key)
WHERE seed = (SELECT min(seed) FROM shown) ORDER BY place, prompt_set, prompt_id, condition"""


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
