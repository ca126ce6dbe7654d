"""Packages and dependencies of moe_jax; name, version and address are in ``pyproject.toml``."""

from setuptools import find_namespace_packages, find_packages, setup

NOTEBOOKS = ["ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"]
HF = ["tokenizers>=0.20"]
DATASETS = ["datasets>=3.0", "zstandard>=0.22"]
SWEEP = ["optuna>=4.2", "cmaes>=0.11"]
QUANTISE = ["qwix>=0.1.8"]
WANDB = ["wandb>=0.19"]
SERVE = ["prometheus-client>=0.20", "starlette>=0.46", "uvicorn>=0.34"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.27"]
TEST = [
    "mypy>=1.15",
    "setuptools>=77",  # builds the wheel that is tested
    "beartype>=0.22",  # checks the shapes in annotations
    "hypothesis>=6.100",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.8",
    *NOTEBOOKS,
    *HF,
    *DATASETS,
    *SWEEP,
    *WANDB,
    *SERVE,
    "openai>=1.60",  # the client of the endpoint
    *QUANTISE,
]
EXTRAS = {
    "test": TEST,
    "docs": DOCS,
    "hf": HF,  # tokenizers of released models
    "datasets": DATASETS,  # data.source=hf:NAME
    "tpu": ["jax[tpu]>=0.10.2"],
    "cuda": ["jax[cuda13]>=0.10.2"],
    "cuda12": ["jax[cuda12]>=0.10.2"],  # for drivers older than 580
    "kernels": ["tokamax>=0.0.12"],
    "sweep": SWEEP,  # samplers of moe-jax sweep
    "quantise": QUANTISE,  # codes and scales of moe-jax quantise
    "tensorboard": ["tensorboard>=2.16"],  # shows the event files of runs
    "wandb": WANDB,  # the writer of Weights & Biases
    "serve": SERVE,  # moe-jax serve
    "browser": ["playwright>=1.50"],  # tests of pages, in an installed Chromium
    "parity": ["torch==2.13.0", "transformers>=5.0"],
}

setup(
    # Configs and ablations stand at the top of the repository and are installed inside the package.
    packages=[
        *find_packages(include=["moe_jax", "moe_jax.*"]),
        *(f"moe_jax.{name}" for name in find_namespace_packages(include=["configs*"])),
        *(f"moe_jax.{name}" for name in find_packages(include=["experiments*"])),
    ],
    package_dir={"moe_jax.configs": "configs", "moe_jax.experiments": "experiments"},
    package_data={
        "moe_jax": ["py.typed", "*/*.j2", "benchmark/*.json"],
        "moe_jax.experiments": ["results/*/results.jsonl"],
    },
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.5",
        "etils[epath]>=1.9",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "importlib_resources>=6",
        "jax>=0.10.2",
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "ml-collections>=1.1.0",
        "ml_dtypes>=0.5",
        "numpy>=1.26",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pyarrow>=16",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "safetensors>=0.5",
        "scipy>=1.13",
        "tensorflow-datasets>=4.9.10",
        # Newer ones fail on the protobuf that TensorFlow holds back, and ask for no other.
        "tensorflow-metadata>=1.16,<1.21",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["moe-jax = moe_jax.cli.main:main"]},
)
