"""Submit many searches, devices x budgets x seeds, to a SLURM cluster, with a folder of its own for each.

python examples/many_searches.py FOLDER --target cpu=4ms,6ms --target vpu=30ms --seeds 0 1 2 [--data SPEC]

Needs `pip install 'quadranet-nas[cluster]'` (submitit). Without SLURM, or with --cluster local, the jobs are
processes of this machine, all at once. A job whose time is up is queued again by itself and goes on. The same
command submits again what has failed or was killed, and lists what is complete; call it when no job of the
last call is left.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import submitit


class Search:
    """A search as a job: it starts, goes on where it was stopped, or is done already."""

    def __call__(self, out: Path, device: str, budget: str, settings: dict[str, Any]) -> str:
        """Run the search in its folder; return a line with the result."""
        import qnas  # here: in the job, not where it is submitted

        if not (out / "arch.json").is_file():  # written last
            resume = (out / "config.json").is_file()
            qnas.run_search(budgets={device: budget}, out=out, resume=resume, **settings)
        found = qnas.load_run(out)
        return f"{out.name}  {found.latency_ms:.3f} ms  accuracy {found.accuracy:.1%}"

    def checkpoint(self, *arguments: Any) -> submitit.helpers.DelayedSubmission:
        """Return what is run when the time is up and the job is queued again: the same, which goes on."""
        return submitit.helpers.DelayedSubmission(self, *arguments)


def grid(folder: Path, targets: list[str], seeds: list[int]) -> list[tuple[Path, str, str, int]]:
    """Return the folder, device, budget and seed of each search; a target is DEVICE=BUDGET[,BUDGET...]."""
    pairs = [
        (name, budget)
        for name, _, all_of in (t.partition("=") for t in targets)
        for budget in all_of.split(",")
    ]
    return [
        (folder / f"{Path(n).stem}-{b}-{seed}".replace("/", "_"), n, b, seed)
        for (n, b), seed in product(pairs, seeds)
    ]


def main() -> None:
    """Submit the searches that are not complete, and list those that are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", action="append", required=True, metavar="DEVICE=BUDGET[,BUDGET...]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--space", help="by name or as a YAML file; default: that of qnas search")
    parser.add_argument("--data", default="digits", help="as in qnas search; the same path on every machine")
    parser.add_argument("--preset", help="of search settings, by name or as a YAML file")
    parser.add_argument("--cluster", choices=["slurm", "local", "debug"], help="default: what there is")
    parser.add_argument("--minutes", type=int, default=240, help="of a job, before it is queued again")
    parser.add_argument("--requeues", type=int, default=50, help="at most, for lack of time")
    parser.add_argument("--gpus", type=int, default=0, choices=[0, 1])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--partition", help="of SLURM")
    parser.add_argument("--at-once", type=int, default=16, help="jobs that SLURM runs at the same time")
    parser.add_argument("--wait", action="store_true", help="until all have ended, and list the results")
    options = parser.parse_args()
    limits = {f"{name}_max_num_timeout": options.requeues for name in ("slurm", "local")}
    executor = submitit.AutoExecutor(options.folder / "jobs", cluster=options.cluster, **limits)
    executor.update_parameters(
        name="qnas",
        timeout_min=options.minutes,
        cpus_per_task=options.cores,
        gpus_per_node=options.gpus,
        slurm_partition=options.partition,
        slurm_array_parallelism=options.at_once,
    )
    common = {"space": options.space, "data": options.data, "preset": options.preset}
    asked = grid(options.folder.resolve(), options.target, options.seeds)
    jobs = []
    with executor.batch(allow_implicit_submissions=True):  # one array; there may be none
        for out, device, budget, seed in asked:
            if (out / "arch.json").is_file():
                print(Search()(out, device, budget, {}))
            else:
                jobs.append((out, executor.submit(Search(), out, device, budget, {**common, "seed": seed})))
    for out, job in jobs:
        print(f"{out.name}  submitted as {job.job_id}", flush=True)
    for _, job in jobs if options.wait else []:
        print(job.result(), flush=True)


if __name__ == "__main__":
    main()
