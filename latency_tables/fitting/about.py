"""What the shipped devices are: their names, runtimes and sources, and where their intervals come from."""

EDGE_SOURCE = (
    "fitted to end-to-end measurements of networks published with nn-Meter "
    "(MobiSys 2021, github.com/microsoft/nn-Meter, MIT)"
)
ABOUT: dict[str, dict[str, object]] = {
    "cortex-a76": {
        "aliases": ["cpu"],
        "title": "Cortex-A76 CPU of a Pixel 4",
        "runtime": "TFLite 2.1",
        "precision": "float32",
        "source": EDGE_SOURCE,
        "fusion": "edge",
    },
    "myriad-vpu": {
        "aliases": ["vpu"],
        "title": "Myriad X VPU, Intel Neural Compute Stick 2",
        "runtime": "OpenVINO 2019R2",
        "precision": "float16 on the device, from float32 networks",
        "source": EDGE_SOURCE,
        "fusion": "edge",
    },
    "adreno-640": {
        "aliases": ["adreno640"],
        "title": "Adreno 640 GPU of a Xiaomi Mi 9",
        "runtime": "TFLite 2.1, GPU delegate",
        "precision": "float32",
        "source": EDGE_SOURCE,
        "fusion": "edge",
    },
    "adreno-630": {
        "aliases": ["adreno630"],
        "title": "Adreno 630 GPU of a Pixel 3 XL",
        "runtime": "TFLite 2.1, GPU delegate",
        "precision": "float32",
        "source": EDGE_SOURCE,
        "fusion": "edge",
    },
    "a100": {
        "aliases": ["gpu"],
        "title": "NVIDIA A100, one image at a time, launches overlapped with work",
        "runtime": "TensorRT 8 or PyTorch with launches ahead, CUDA",
        "precision": "float32",
        "source": (
            "fitted to latencies of whole networks by TensorRT (github.com/NVIDIA/TensorRT and "
            "NVIDIA/DeepLearningExamples, Apache-2.0; YOLOv8's documentation), the work of operators as "
            "published with NeuSight (ASPLOS 2025, github.com/sitar-lab/NeuSight, MIT)"
        ),
        "fusion": "eager",
    },
    "a100-throughput": {
        "title": "NVIDIA A100, batches of 128, TF32, channels_last",
        "runtime": "PyTorch eager, CUDA",
        "precision": "float32 with TF32",
        "quantity": "throughput",
        "batch": 128,
        "source": (
            "elementwise operators published with NeuSight "
            "(ASPLOS 2025, github.com/sitar-lab/NeuSight, MIT), products by ConvNeXts (arXiv 2201.03545)"
        ),
        "fusion": "eager",
    },
    "a100-eager": {
        "title": "NVIDIA A100, one image at a time, every operator launched and waited for by itself",
        "runtime": "PyTorch 2.1 eager, CUDA 12.1",
        "precision": "float32",
        "source": (
            "fitted to operator measurements published with NeuSight "
            "(ASPLOS 2025, github.com/sitar-lab/NeuSight, MIT)"
        ),
        "fusion": "eager",
    },
}

TIMM_SOURCE = (
    "fitted to throughputs of whole networks published with timm "
    "(github.com/huggingface/pytorch-image-models, Apache-2.0)"
)
_GPU = {"precision": "float16 by AMP", "quantity": "throughput", "batch": 1024, "source": TIMM_SOURCE}
ABOUT |= {
    "rtx4090": {
        **_GPU,
        "aliases": ["rtx4090-nchw"],
        "title": "NVIDIA GeForce RTX 4090, large batches, every operator launched by itself",
        "runtime": "PyTorch 2.9 eager, CUDA 12.8, contiguous",
        "fusion": "cuda",
    },
    "rtx4090-compiled": {
        **_GPU,
        "title": "NVIDIA GeForce RTX 4090, large batches, compiled",
        "runtime": "PyTorch 2.9 torch.compile, CUDA 12.8",
        "fusion": "triton",
    },
    "rtx3090": {
        **_GPU,
        "aliases": ["rtx3090-nhwc"],
        "title": "NVIDIA GeForce RTX 3090, large batches, every operator launched by itself",
        "runtime": "PyTorch 2.4 eager, CUDA 12.4, channels_last",
        "fusion": "cuda",
    },
    "rtx5090": {
        **_GPU,
        "aliases": ["rtx5090-compiled"],
        "title": "NVIDIA GeForce RTX 5090, large batches, compiled",
        "runtime": "PyTorch 2.9 torch.compile, CUDA 12.8",
        "fusion": "triton",
    },
    "i7-12700h": {
        "aliases": ["i7-12700h-compiled", "desktop"],
        "title": "Intel Core i7-12700H, all cores",
        "runtime": "PyTorch 2.4 torch.compile",
        "precision": "float32",
        "source": TIMM_SOURCE,
        "fusion": "inductor",
    },
}

INTERVAL_SOURCE = "networks of a family by a fit without it, each family with the same weight"
OVERLAPPED_INTERVALS = (
    f"{INTERVAL_SOURCE}; convolutional networks of TensorRT, those in float16 or TF32 with a rate of their "
    "own; the form of the model was chosen with them in sight"
)
EAGER_INTERVALS = (
    "published latencies of whole networks that took no part, each family with the same weight, "
    "two by PyTorch and nine by TensorFlow, which joins some operators"
)
