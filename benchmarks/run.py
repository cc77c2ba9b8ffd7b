"""Run the benchmarks: python benchmarks/run.py [--only REGEX] [--rounds N] [--json FILE] [--quick] [--list].

Prints each row as it is measured and at the end two tables in Markdown: targets with verdicts, and all figures.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import array_scenarios
import harness
import lock_scenarios
import pool_scenarios
import queue_scenarios
import startup_scenarios


def scenarios() -> list[harness.Scenario]:
    """Every scenario, in the order of the table."""
    return [
        *queue_scenarios.scenarios(),
        *lock_scenarios.scenarios(),
        *pool_scenarios.scenarios(),
        *array_scenarios.scenarios(),
        *startup_scenarios.scenarios(),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and return 1 when a must was missed or one of our own measurements failed."""
    options = _options(arguments)
    chosen = [scenario for scenario in scenarios() if re.search(options.only, scenario.name)]
    if options.list:
        print("\n".join(scenario.name for scenario in chosen))
        return 0
    if not chosen:
        print(f"no scenario matches {options.only!r}; see --list", file=sys.stderr)
        return 2
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that what lies in /dev/shm goes with an interrupted run
    settings = harness.Settings(
        rounds=options.rounds or (1 if options.quick else harness.Settings.rounds),
        window_s=options.window,
        timeout_s=options.timeout,
        quick=options.quick,
    )
    facts = harness.machine()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    if any(scenario.unit == "bytes" for scenario in chosen) and not options.quick:
        harness.use_all_memory()
    results = []
    for number, scenario in enumerate(chosen, 1):
        print(f"\n[{number}/{len(chosen)}] {scenario.name}: {scenario.title}", flush=True)
        results.append(result := harness.run(scenario, settings))
        for rival in scenario.measure:
            print(f"  {rival:22} {harness.figure(result, rival)}", flush=True)
        for target in scenario.targets:
            text, word = harness.verdict(result, target)
            print(f"  vs {target.rival}: {text}, must | aim: {harness.floors(target)} {word}", flush=True)
    print(f"\n{settings.rounds} rounds of {settings.window_s:g} s each, interleaved\n\n{harness.tables(results)}")
    if options.json:
        Path(options.json).write_text(json.dumps(_record(facts, results), indent=1), encoding="utf-8")
    verdicts = [harness.verdict(result, target)[1] for result in results for target in result.scenario.targets]
    ours_failed = any(result.failures(harness.OURS) for result in results)
    return int(ours_failed or "MISSED" in verdicts)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", metavar="REGEX", help="scenarios whose name matches")
    parser.add_argument("--rounds", type=int, metavar="N", help="measurements of each rival (9; --quick: 1)")
    parser.add_argument(
        "--window", type=float, default=harness.Settings.window_s, metavar="S", help="timed seconds each"
    )
    parser.add_argument("--timeout", type=float, default=harness.Settings.timeout_s, metavar="S", help="limit of each")
    parser.add_argument("--json", metavar="FILE", help="write every round there")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that all works, measures nothing")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    return parser.parse_args(arguments)


def _record(facts: dict[str, str], results: list[harness.Result]) -> dict[str, object]:
    rows = {
        result.scenario.name: {
            "title": result.scenario.title,
            "targets": [asdict(target) for target in result.scenario.targets],
            "rounds": {rival: [asdict(one) for one in rounds] for rival, rounds in result.rounds.items()},
        }
        for result in results
    }
    return {"machine": facts, "scenarios": rows}


if __name__ == "__main__":
    sys.exit(main())
