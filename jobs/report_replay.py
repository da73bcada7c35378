"""The report's head, and its sections on replayed texts."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING

from analysis import page
from analysis.page import Html
from jobs.context import versions
from jobs.effects import control_warnings, effect_warnings
from jobs.report_source import Record, Source, as_number, as_percent, judge_of, noted_model
from jobs.report_sql import (
    CONDITIONS,
    MODEL,
    MONITORED,
    OTHER_SCORES,
    PROMPT_SETS,
    RATES,
    SHOWN,
    TEXT_FACTS,
    TEXTS,
    VERSIONS,
)
from store.results import ResultStore
from store.schemas import TABLES

if TYPE_CHECKING:
    from analysis.plots import Rate

LAST_SHARE = 0.5  # a curve over tokens ends where fewer texts than this share are still running


def head(source: Source) -> list[Html]:
    models = source.ask(source.sql(MODEL))
    model = models[0] if models else {}
    made = source.ask(source.sql(VERSIONS))
    description = (
        [page.paragraph(source.study.description.strip())] if source.study and source.study.description else []
    )
    facts: list[tuple[str, object]] = [("model", model.get("source", "not recorded"))]
    facts += [(key, model[key]) for key in ("revision", "adapter") if model.get(key)]
    facts += [
        ("fingerprint", source.model),
        ("layers", model.get("n_layers")),
        ("d_model", model.get("d_model")),
        ("dtype", model.get("dtype")),
        ("made", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"),
        ("versions", ", ".join(f"{key} {value}" for key, value in versions().items() if key in ("resid", "numpy"))),
    ]
    for record in made:
        by = "resid {code_version}, transformers {transformers_version}, torch {torch_version}".format(**record)
        facts.append((f"{record['texts']} texts by", f"{by}, {record['first']:%Y-%m-%d} to {record['last']:%Y-%m-%d}"))
    decodings = dict.fromkeys(record["decoding"] for record, _ in source.conditions)
    facts += [("decoding", decoding) for decoding in decodings]
    commits = {table: len(ResultStore(source.results).commits(table)) for table in TABLES}
    files = ", ".join(f"{table} {count}" for table, count in commits.items() if count)
    provenance = f"Read from {source.results}, as committed at that time; files by table: {files or 'none'}."
    top = [*description, page.table(["", ""], facts), page.paragraph(provenance, "note provenance")]
    if sets := source.ask(source.sql(PROMPT_SETS)):
        rows = [(r["prompt_set"], r["responses"] or "", r["prompts"], r["rows"]) for r in sets]
        table = page.table(["prompt set", "with text of", "#prompts", "#rows"], rows)
        top.append(page.fold("Prompt sets", table, page.sql(source.sql(PROMPT_SETS))))
    about = (source.connection, source.name, source.model)
    warnings = [*effect_warnings(*about), *control_warnings(*about)]
    top += [page.paragraph(f"Warning: {warning}", "note warning") for warning in warnings]
    top.append(page.sql(source.sql(MODEL), source.sql(VERSIONS)))
    if model.get("receipt"):
        receipt = json.dumps(json.loads(model["receipt"]), indent=1, ensure_ascii=False)
        top.append(page.fold("Receipt of the site self-test", page.element("pre", page.text(receipt))))
    note = "Every query on this page runs again as it stands: paste it into the prompt of resid sql --results URL."
    note_of = noted_model(source.results, source.name)
    if note_of not in (None, source.model):
        moved = f"The study has since moved to the model {note_of}: this page is about an earlier one."
        top.insert(0, page.paragraph(moved, "warning"))
    return [*top, page.note(note)]


def refusals(source: Source) -> list[Html]:
    from analysis.plots import rate_dots

    sql = source.sql(RATES)
    rates = source.ask(sql)
    if not rates:
        return [page.missing(f"No refusal rates: nothing is replayed yet. Remedy: {source.remedy('replay')}")]
    if not any(record["n_scored"] for record in rates):
        stage = "score" if any(record["n_generated"] for record in rates) else "replay"
        why = "no text is scored by a refusal judge" if stage == "score" else "no text is generated yet"
        return [page.missing(f"No refusal rates: {why}. Remedy: {source.remedy(stage)}"), page.sql(sql)]
    body: list[Html] = []
    depth = {record["condition"]: depth for record, depth in source.conditions}
    order = {name: i for i, name in enumerate(depth)}
    judged = sorted({judge_of(record) for record in rates})
    # What the study compares comes first: sets under many conditions, then those that only feed something else.
    wide = Counter((record["prompt_set"], judge_of(record)) for record in rates)
    rates.sort(key=lambda r: (-wide[r["prompt_set"], judge_of(r)], r["prompt_set"], order[r["condition"]], judge_of(r)))
    for judge in judged:
        mine = [record for record in rates if judge_of(record) == judge]
        if len(judged) > 1:
            body.append(page.heading(f"Judge {judge}"))
        panels: dict[tuple[str, ...], list[tuple[str, list[Rate]]]] = {}
        for prompts, group in groupby(mine, key=lambda record: str(record["prompt_set"])):
            dots = [rate_of(record, depth[record["condition"]]) for record in group]
            panels.setdefault(tuple(dot.label for dot in dots), []).append((prompts, dots))
        for i, same in enumerate(panels.values()):
            name = f"rates-{judged.index(judge)}-{i}"
            body.append(page.figure(rate_dots(name, same, "refused (%)", f"texts judged refusals by {judge}")))
    body.append(
        page.note(
            "Dots: refused texts among scored ones; whiskers: 95% Wilson intervals, which take texts as independent "
            "and so are too narrow where prompts are fewer than texts (several seeds). Hollow grey: controls, under "
            f"what they control. Unscored texts do not count in a rate. Judged by {', '.join(judged)}."
        )
    )
    facts_sql = source.sql(TEXT_FACTS)
    facts = {(fact["prompt_set"], fact["condition"]): fact for fact in source.ask(facts_sql)}
    rows = []
    for r in rates:
        fact: Record = facts.get((r["prompt_set"], r["condition"]), {})
        interval = None if r["rate"] is None else f"{r['low']:.1%} to {r['high']:.1%}"
        row = [r["prompt_set"], "\u2514\u00a0" * depth[r["condition"]] + r["condition"]]
        row += [judge_of(r)] if len(judged) > 1 else []
        row += [r["n"], r["n_prompts"]]
        row += [r["n_scored"], r["n"] - r["n_scored"], r["n_refused"], as_percent(r["rate"]), interval]
        row += [as_percent(fact.get("degenerate")), as_percent(fact.get("cut")), as_number(fact.get("tokens"), 1)]
        rows.append(row)
    heads = ["prompt set", "condition", *(["judge"] if len(judged) > 1 else [])]
    heads += ["#texts", "#prompts", "#scored", "#unscored", "#refused", "#rate"]
    heads += ["#95% interval", "#degenerate", "#cut at length", "#mean tokens"]
    body += [page.table(heads, rows), page.sql(sql, facts_sql)]
    body += _other_scores(source, depth)
    does = [[name, r["control_of"], interventions(r["interventions"])] for name, r in by_condition(source).items()]
    table = page.table(["condition", "control of", "interventions"], does)
    return [*body, page.fold("What each condition does", table, page.sql(source.sql(CONDITIONS)))]


def _other_scores(source: Source, depth: dict[str, int]) -> list[Html]:
    """The scores of judges of anything but refusal and broken text: trait, coherence, unsafe content."""
    sql = source.sql(OTHER_SCORES)
    records = source.ask(sql)
    if not records:
        return []
    order = {name: i for i, name in enumerate(depth)}
    rows = []
    for r in sorted(records, key=lambda r: (r["judge"], r["prompt_set"], order[r["condition"]])):
        row = [r["judge"], r["measures"], r["prompt_set"], "\u2514\u00a0" * depth[r["condition"]] + r["condition"]]
        row += [r["n_scored"], r["n"] - r["n_scored"], as_number(r["mean"], 2)]
        row.append(None if r["mean"] is None else f"{r['low']:.2f} to {r['high']:.2f}")
        unsafe = r["unsafe"] is not None
        row += [as_percent(r["unsafe"]), f"{r['unsafe_low']:.1%} to {r['unsafe_high']:.1%}" if unsafe else None]
        rows.append(row)
    heads = ["judge", "measures", "prompt set", "condition", "#scored", "#unscored", "#mean", "#10% to 90% of texts"]
    note = "Trait and coherence run from 0 to 100. A text is unsafe where its score is above the judge's threshold."
    table = page.table([*heads, "#unsafe", "#95% interval"], rows)
    return [page.heading("Scores of other judges"), table, page.note(note), page.sql(sql)]


def rate_of(record: Record, depth: int) -> Rate:
    from analysis.plots import Rate

    n, n_scored, n_hits = record["n"], record["n_scored"], record["n_refused"]
    return Rate(record["condition"], n, n_scored, n_hits, record["rate"], record["low"], record["high"], depth)


def sweeps(source: Source) -> list[Html]:
    from analysis.plots import Line, Panel, line_panels

    swept: dict[str, set[float]] = {}
    for record, _ in source.conditions:
        if record["coefficient"] is not None:
            swept.setdefault(record["base_condition"], set()).add(record["coefficient"])
    bases = [base for base, values in swept.items() if len(values) > 1]
    if not bases:
        return [page.missing("No sweeps: no condition of this study has a list of coefficients.")]
    known, sql = by_condition(source), source.sql(RATES)
    panels = []
    scored = [record for record in source.ask(sql) if record["rate"] is not None]
    for (judge, prompts), group in groupby(
        sorted(scored, key=lambda r: (judge_of(r), r["prompt_set"])), key=lambda r: (judge_of(r), r["prompt_set"])
    ):
        records = [{**record, **known[record["condition"]]} for record in group]
        lines = []
        for base in bases:
            points = sorted(
                (r for r in records if r["base_condition"] == base and r["coefficient"] is not None),
                key=lambda r: float(r["coefficient"]),
            )
            if points:
                y, low, high = ([100 * point[key] for point in points] for key in ("rate", "low", "high"))
                x = [point["coefficient"] for point in points]
                control = source.styles[points[0]["condition"]][1]
                lines.append(Line(base, x, y, bases.index(base), low, high, control=control, markers=True))
        plain = [(r["condition"], 100 * r["rate"]) for r in records if json.loads(r["interventions"]) == []]
        if lines:
            title = f"{prompts} ({judge})" if len({judge_of(r) for r in scored}) > 1 else prompts
            panels.append(
                Panel(title, lines, "coefficient (no unit)", "refused (%)", (-3, 103), whole_x=False, references=plain)
            )
    if not panels:
        return [page.missing(f"Sweeps are not scored yet. Remedy: {source.remedy('run')}"), page.sql(sql)]
    svg = line_panels("sweeps", panels, f"refusal rate against coefficient for {', '.join(bases)}", share_y=True)
    note = "Bands: 95% Wilson intervals. Dotted: conditions without interventions."
    return [page.figure(svg), page.note(note), page.sql(sql, source.sql(CONDITIONS))]


def monitored(source: Source) -> list[Html]:
    from analysis.plots import Line, Panel, line_panels

    sql = source.sql(MONITORED)
    records = source.ask(sql)
    if not records:
        why = "No projections were recorded while generating. Remedy: give the study a replay.monitor section, then"
        return [page.missing(f"{why} {source.remedy('replay')}")]
    body: list[Html] = []
    places = dict.fromkeys((r["direction"], r["component"], r["layer"]) for r in records)
    for number, (direction, component, layer) in enumerate(places):
        panels: list[Panel] = []
        mine = [r for r in records if (r["direction"], r["component"]) == (direction, component)]
        for prompts in sorted({r["prompt_set"] for r in mine}):
            lines: list[Line] = []
            for condition in by_condition(source):
                style, control = source.styles[condition]
                curve = [r for r in mine if (r["prompt_set"], r["condition"]) == (prompts, condition)]
                curve = [r for r in curve if r["n"] >= LAST_SHARE * curve[0]["n"]]
                if curve:
                    x, y = [r["token_index"] for r in curve], [r["projection"] for r in curve]
                    lines.append(Line(condition, x, y, style, control=control))
            label = "h \u00b7 v\u0302 (activation units)"
            panels.append(Panel(prompts, lines, "response token", label, level=0.0))
        body.append(page.heading(f"{direction} at {component}.{layer}"))
        about = f"mean projection on {direction} at {component}.{layer} by response token and condition"
        body.append(page.figure(line_panels(f"monitored-{number}", panels, about, height=3.2, share_y=True)))
    body.append(
        page.note(
            "Mean over texts, after the interventions at that site; the last monitored layer. Token 0 is the forward "
            "that chooses the first token. A curve ends where fewer than half of its texts are still running; towards "
            "its end it is a mean over the longer texts only. Dashed: controls."
        )
    )
    return [*body, page.sql(sql)]


def texts(source: Source) -> list[Html]:
    sql = source.sql(TEXTS)
    records = source.ask(sql)
    if not records:
        return [page.missing(f"No texts: nothing is generated yet. Remedy: {source.remedy('replay')}")]
    order = {record["condition"]: i for i, (record, _) in enumerate(source.conditions)}
    body = [
        page.note(f"At most {SHOWN} prompts, chosen by a hash of their ids, under every condition; the first seed.")
    ]
    for number, ((prompts, _), group) in enumerate(groupby(records, key=lambda r: (r["prompt_set"], r["prompt_id"]))):
        texts = sorted(group, key=lambda r: order[r["condition"]])
        messages = json.loads(texts[0]["messages"]) if texts[0]["messages"] else []
        prompt = messages[-1]["content"] if messages else "(the prompt's text is not recorded)"
        said = [page.element("pre", page.text(f"{m['role']}: {m['content']}"), css="text") for m in messages]
        cards = []
        for r in texts:
            tags = [page.tag(verdict) for verdict in sorted(r["verdicts"] or ["unscored"])]
            tags += [page.tag(f"{r['finish_reason']} after {r['n_tokens']} tokens")]
            text = page.element("pre", page.text(r["text"]), css="text")
            cards.append(page.element("div", page.element("h4", page.text(r["condition"])), *tags, text, css="card"))
        line = " ".join(str(prompt).split())
        summary = f"{prompts}: {line[:110]}" + "\u2026" * (len(line) > 110)
        body.append(page.fold(summary, *said, page.element("div", *cards, css="cards"), opened=number == 0))
    return [*body, page.sql(sql)]


def by_condition(source: Source) -> dict[str, Record]:
    return {record["condition"]: record for record, _ in source.conditions}


def interventions(text: str) -> str:
    """Say in a line what a condition's interventions (JSON) do, in their order."""
    said = []
    for item in json.loads(text):
        rest = {key: value for key, value in item.items() if value is not None and (key, value) != ("from_offset", 0)}
        if "add" in rest:
            norm = rest.pop("norm", "natural")
            rule = norm if isinstance(norm, str) else f"norm of {norm['match']}"
            what = f"add {rest.pop('coefficient', 1):g} \u00d7 {rest.pop('add')} ({rule})"
        elif "clamp" in rest:
            what = f"clamp {rest.pop('clamp')} to {rest.pop('projection'):g}"
        else:
            names = rest.pop("project_out", [])
            what = f"project out {', '.join([names] if isinstance(names, str) else names)}"
        where = f"{rest.pop('component', '')} layers {json.dumps(rest.pop('layers', None))}"
        said.append(f"{what} at {where}" + "".join(f", {key} {value}" for key, value in rest.items()))
    return "; then ".join(said) or "none"
