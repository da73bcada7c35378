"""Stage 4, score: judges label what was generated. Re-judging never touches the texts.

A judge that can fail (a served model) leaves an error without a value, which the next run tries again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from analysis.endpoint_judge import EndpointJudge, NoScoreError
from analysis.judges import JudgeScore
from jobs.context import Context, StageReport, block_id, table_of
from jobs.judging import StudyJudge, key_of, missing_keys, study_judges
from jobs.progress import Progress
from jobs.stage import main_for
from pipeline.cluster import Cluster
from pipeline.judge_client import EndpointDownError, Failure, JudgeClient, Request
from store.errors import StudyError
from store.sql import connect
from store.yaml_file import where

BLOCK = 10_000  # texts that are scored and committed together
ASKED_BLOCK = 64  # the same, where each costs a request
ERROR_LENGTH = 500  # characters of an error that are stored

Text = dict[str, str]
Todo = list[tuple[StudyJudge, list[Text]]]


def unscored(context: Context, judges: Sequence[StudyJudge]) -> tuple[Todo, int]:
    """Return each judge with the texts of this study that it has not scored, and how many scores are there."""
    connection = connect(context.results.location)
    try:
        texts = connection.sql(
            "SELECT generation_key, text, finish_reason, prompt_id, list(DISTINCT prompt_set) AS sets FROM generations "
            "WHERE study = $study GROUP BY ALL ORDER BY generation_key",
            params={"study": context.study.name},
        ).to_arrow_table()
    finally:
        connection.close()
    scores = context.results.read("scores", columns=["generation_key", "judge", "judge_version", "error"])
    done = {
        (record["generation_key"], record["judge"], record["judge_version"])
        for record in scores.to_pylist()
        if record["error"] is None
    }
    todo: Todo = []
    found = 0
    records = [
        {**record, "prompt": context.prompts_by_id[record["prompt_id"]].text}
        for record in texts.to_pylist()
        if record["prompt_id"] in context.prompts_by_id  # else of prompts that the study had before
    ]
    for judge in judges:
        mine = [text for text in records if judge.sets is None or not judge.sets.isdisjoint(text["sets"])]
        new = [text for text in mine if (text["generation_key"], judge.name, judge.version) not in done]
        found += len(mine) - len(new)
        if new:
            todo.append((judge, new))
    return todo, found


def run(context: Context, cluster: Cluster, progress: Progress) -> StageReport:
    """Score every text of the study that a judge has not scored.

    Raises:
        StudyError: if texts are to be scored by a served model and its key is not set.
    """
    report = StageReport("score", unit="scores")
    if context.study.replay is None:
        return report
    judges = study_judges(context.study)
    asked = [
        {
            "study": context.study.name,
            "judge": judge.name,
            "judge_version": judge.version,
            "measures": judge.measures,
            "options": judge.options,
        }
        for judge in judges
    ]
    context.results.replace("judges", context.study.name, table_of("judges", asked))
    todo, report.cached = unscored(context, judges)
    if not todo:
        if not report.cached:
            report.waiting.append("nothing is generated yet")
        return report
    todo = [(judge, _not_in_vain(context, judge, texts, report)) for judge, texts in todo]
    todo = [(judge, texts) for judge, texts in todo if texts]
    if not todo:
        return report
    _require_keys(context, [judge for judge, _ in todo])
    earlier = _failures(context)
    with progress.task("score", sum(len(texts) for _, texts in todo), "texts") as advance:
        for judge, texts in todo:
            failed: list[str] = []
            try:
                for part, scores in _scored(judge, texts):
                    rows = [_row(judge, text, score) for text, score in zip(part, scores, strict=True)]
                    keys = [text["generation_key"] for text in part]
                    # Texts that failed before are a block of their own, or the block of that attempt would stand.
                    attempt = sum(earlier.get((key, judge.name, judge.version), 0) for key in keys)
                    name = [judge.name, judge.version, *keys, *([f"attempt {attempt}"] if attempt else [])]
                    context.results.write_block("scores", block_id(name), table_of("scores", rows))
                    failed += [score for score in scores if isinstance(score, str)]
                    context.asked_in_vain |= {
                        (key, judge.name, judge.version): score
                        for key, score in zip(keys, scores, strict=True)
                        if isinstance(score, str)
                    }
                    report.done += sum(not isinstance(score, str) for score in scores)
                    advance(len(part))
            except EndpointDownError as error:
                report.waiting.append(f"judge {judge.name!r}: {error}")
            if failed:
                report.waiting.append(_no_score(judge, len(failed), failed[0]))
    return report


def _not_in_vain(context: Context, judge: StudyJudge, texts: list[Text], report: StageReport) -> list[Text]:
    """Return the texts that were not asked about in an earlier round of this run, and note the others as waiting."""
    vain = context.asked_in_vain
    why = [vain.get((text["generation_key"], judge.name, judge.version)) for text in texts]
    reasons = [reason for reason in why if reason is not None]
    if reasons:
        report.waiting.append(_no_score(judge, len(reasons), reasons[0]))
    return [text for text, reason in zip(texts, why, strict=True) if reason is None]


def _no_score(judge: StudyJudge, number: int, reason: str) -> str:
    return f"judge {judge.name!r} gave no score for {number} text(s), which the next run asks again: {reason}"


def _require_keys(context: Context, judges: Sequence[StudyJudge]) -> None:
    missing = set(missing_keys(judges))
    for judge in judges:
        if isinstance(judge.judge, EndpointJudge) and judge.judge.api_key_env in missing:
            key = f"judges.{judge.name}.api_key_env"
            raise StudyError(
                f"the environment variable {judge.judge.api_key_env} is not set, and it is to hold the judge's key",
                file=where(context.study.file, key),
                key=key,
                remedy=f"export {judge.judge.api_key_env}=...; nothing that was generated or scored is lost",
            )


def _failures(context: Context) -> dict[tuple[str, str, str], int]:
    """Return how often each text failed under each judge and version."""
    columns = ["generation_key", "judge", "judge_version", "error"]
    counts: dict[tuple[str, str, str], int] = {}
    for record in context.results.read("scores", columns=columns, filters=[("error", "!=", "")]).to_pylist():
        key = (record["generation_key"], record["judge"], record["judge_version"])
        counts[key] = counts.get(key, 0) + 1
    return counts


def _scored(judge: StudyJudge, texts: Sequence[Text]) -> Iterator[tuple[Sequence[Text], list[JudgeScore | str]]]:
    """Yield texts that are committed together with their scores, or why there is none.

    Raises:
        EndpointDownError: if a served model is not there.
    """
    if isinstance(judge.judge, EndpointJudge):
        yield from _asked(judge.judge, texts)
        return
    for start in range(0, len(texts), BLOCK):
        part = texts[start : start + BLOCK]
        yield part, [judge.judge.judge(t["text"], finish_reason=t["finish_reason"], prompt=t["prompt"]) for t in part]


def _asked(judge: EndpointJudge, texts: Sequence[Text]) -> Iterator[tuple[Sequence[Text], list[JudgeScore | str]]]:
    with JudgeClient(
        judge.base_url,
        key_of(judge),
        timeout=judge.timeout,
        retries=judge.retries,
        concurrency=judge.concurrency,
        requests_per_minute=judge.requests_per_minute,
    ) as client:
        with_logprobs = judge.logprobs
        for start in range(0, len(texts), ASKED_BLOCK):
            part = texts[start : start + ASKED_BLOCK]

            def requests(chosen: Sequence[Text], logprobs: bool) -> list[Request]:
                return [Request(*judge.request(text["text"], text["prompt"], logprobs=logprobs)) for text in chosen]

            replies = list(client.post_all(requests(part, with_logprobs)))
            refused = [i for i, r in enumerate(replies) if isinstance(r, Failure) and r.rejected and _on_logprobs(r)]
            if with_logprobs and refused:  # this server knows none
                with_logprobs = False
                again = client.post_all(requests([part[i] for i in refused], False))
                for i, reply in zip(refused, again, strict=True):
                    replies[i] = reply
            yield part, [_read(judge, reply) for reply in replies]


def _on_logprobs(failure: Failure) -> bool:
    return "logprob" in failure.problem.lower()


def _read(judge: EndpointJudge, reply: object) -> JudgeScore | str:
    if isinstance(reply, Failure):
        return reply.problem
    try:
        return judge.score(reply)
    except NoScoreError as error:
        return str(error)


def _row(judge: StudyJudge, text: Text, score: JudgeScore | str) -> dict[str, object]:
    row = {"generation_key": text["generation_key"], "judge": judge.name, "judge_version": judge.version}
    nothing = dict.fromkeys(("value", "label", "detail", "error"))
    if isinstance(score, str):
        return {**row, **nothing, "error": score[:ERROR_LENGTH] or "no score"}
    return {**row, **nothing, "value": score.value, "label": score.label, "detail": score.detail}


if __name__ == "__main__":
    main_for("score")
