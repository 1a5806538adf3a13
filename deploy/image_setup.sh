#!/bin/sh
# Runs as root while the image is built. A new volume of Docker's takes the owner of the folder that it is mounted on;
# without this one it would be root's, and the service, which runs as the user bentoml, could not write to it.
set -eu
install -d -o bentoml -g bentoml -m 0750 /home/bentoml/.trl-remote
