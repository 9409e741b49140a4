# The environment of requirements.txt with Horovod, and the repository; scripts/run_docker.sh builds
# and starts it. Any user may run it: nothing is written outside the mounted folders and /tmp.
FROM python:3.11-slim

RUN apt-get update \
  && apt-get install -y --no-install-recommends cmake g++ make openssh-client \
  && rm -rf /var/lib/apt/lists/*

ENV POCKETSIZE_VENV=/usr/local PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /pocketsize
COPY requirements.txt constraints.txt ./
RUN pip install -r requirements.txt
COPY scripts/common.sh scripts/install_horovod.sh scripts/
RUN scripts/install_horovod.sh
COPY . .

ENTRYPOINT ["scripts/run_local.sh"]
