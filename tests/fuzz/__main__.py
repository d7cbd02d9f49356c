"""The command: many cases, or one."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.fuzz.case import Case, draw
from tests.fuzz.check import WRONG, Verdict, check
from tests.fuzz.shrink import shrink


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; then upwards")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--case", help="one case, as a failure's line gives it")
    parser.add_argument("--lowering", default=None, help="in place of the case's own")
    parser.add_argument(
        "--shrink", type=int, default=0, help="runs spent on making a failure small"
    )
    return parser.parse_args()


def _smaller(case: Case, verdict: Verdict, trials: int) -> Case:
    if not trials:
        return case
    return shrink(case, lambda c: check(c).kind == verdict.kind, trials=trials)


def _with(case: Case, lowering: str | None) -> Case:
    if lowering is None:
        return case
    return Case(**{**vars(case), "lowering": lowering})


def _summary(verdicts: list[Verdict], seconds: float) -> str:
    kinds = Counter(v.kind for v in verdicts)
    loops = sum(v.loops > 0 for v in verdicts)
    found = sum((v.found for v in verdicts), Counter())
    lines = [
        f"{len(verdicts)} cases in {seconds:.0f} s: "
        + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()),
        f"{loops} with loops ({loops / max(len(verdicts), 1):.0%}), "
        f"{sum(v.loops for v in verdicts)} loops ran",
        "found: " + ", ".join(f"{n} {what}" for what, n in found.most_common(24)),
    ]
    return "\n".join(lines)


def main() -> int:
    arguments = _arguments()
    if arguments.case is not None:
        cases = iter([Case.from_json(arguments.case)])
    else:
        cases = (draw(arguments.seed + i) for i in range(arguments.cases))
    start = time.monotonic()
    verdicts: list[Verdict] = []
    for case in cases:
        case = _with(case, arguments.lowering)
        verdict = check(case)
        verdicts.append(verdict)
        if verdict.kind in WRONG or arguments.case is not None:
            print(f"{verdict.kind} seed {case.seed}: {verdict.detail}", flush=True)
            print(f"  {_smaller(case, verdict, arguments.shrink).to_json()}", flush=True)
        elif verdict.detail:
            print(f"{verdict.kind} seed {case.seed}: {verdict.detail}", flush=True)
        seconds = time.monotonic() - start
        if len(verdicts) % 10 == 0:
            bad = sum(v.kind in WRONG for v in verdicts)
            loops = sum(v.loops > 0 for v in verdicts)
            print(
                f"... {len(verdicts)} cases, {loops} with loops, {bad} bad, {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        if seconds > arguments.seconds:
            break
    print(_summary(verdicts, time.monotonic() - start))
    return int(any(v.kind in WRONG for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
