# CUDA, vLLM and this project in one image. torch's wheels bring CUDA's libraries; the host needs an NVIDIA driver and its container toolkit.
#   docker build -t lit-opd .
#   docker run --gpus all --ipc host -v "$PWD/runs:/work/runs" lit-opd fit --config configs/qwen3_1.7b_from_4b_1gpu.yaml
# The check of the machine: docker run --gpus all --ipc host --entrypoint python lit-opd -m benchmarks.gpu
FROM python:3.12-slim
# Triton compiles its kernels with a C compiler
RUN apt-get update && apt-get install --yes --no-install-recommends build-essential git && rm -rf /var/lib/apt/lists/*
WORKDIR /work
# vLLM first: it decides which torch there is
# 0.32 is the newest release whose weight transfer is known here; later ones take weights by folder
ARG VLLM=0.32.0
RUN pip install --no-cache-dir "vllm==${VLLM}"
COPY . .
RUN pip install --no-cache-dir --editable ".[eval,data,lora,tensorboard]" pytest
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["python", "train.py"]
CMD ["--help"]
