"""The task with qnas: peers.py runs it."""

from harness import Found, Task, Written, run

# user code
import qnas


def datasets(task: Task) -> qnas.Datasets:
    return qnas.Datasets(task.images("train"), task.images("heldout"), task.images("test"), flip=False)


def search(task: Task) -> Found:
    space = qnas.make_space(
        "peers",
        input={"channels": task.channels, "resolution_px": task.px},
        norm="batchnorm",
        activation="relu6",
        stem={"channels": 16, "kernel": 3, "stride": task.stem_stride, "activation": True},
        transition="block",
        candidates=[{"block": "mbconv", "kernel": [3, 5, 7], "expansion": [2, 4]}, {"block": "identity"}],
        stages=[
            {"channels": 16, "positions": 2, "stride": 1},
            {"channels": 32, "positions": 3, "stride": 2},
            {"channels": 64, "positions": 3, "stride": 2},
        ],
        head={"channels": 128, "classes": 10},
    )
    result = qnas.run_search(
        space,
        {"cpu": "10s"},
        max_macs=task.max_macs,
        data=datasets(task),
        out=task.folder / "run",
        resume=task.resume,
        resolution_px=task.px,
        warmup_epochs=task.warmup_epochs,
        search_epochs=task.search_epochs,
        batch_size=task.batch_size,
        learning_rate=task.learning_rate,
        arch_learning_rate=task.arch_learning_rate,
        seed=task.seed,
    )
    return Found(list(result.arch.choices), result.macs, result)


def export(task: Task, found: Found) -> Written:
    trained = qnas.train_subnet(found.keep, data=datasets(task), epochs=1, force=True)
    files = qnas.export(trained, formats=["onnx"], data=datasets(task), force=True)
    return Written(files[0], "qnas.export", trained.build())


# end of user code

if __name__ == "__main__":
    run(search, export)
