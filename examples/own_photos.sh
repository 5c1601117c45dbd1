#!/bin/sh
# From `pip install` to a network that runs, on a folder of your own images.
#
#   examples/own_photos.sh IMAGES     IMAGES/CLASS/*, or IMAGES/train/CLASS/* and IMAGES/test/CLASS/*
#   examples/own_photos.sh            writes scikit-learn's digits as such a folder, and takes that
#
# Runs in the current folder; each of these can be set before it:
#   PACKAGE     what pip installs: quadranet-nas, or a checkout's folder
#   VENV        the environment that it goes into; one that has qnas is taken as it is
#   DEVICE      where the network shall run (qnas devices), or `here`, which measures this machine
#   BUDGET      the latency that it may take there
#   SPACE       what is searched, with the resolution of images that it deploys at
#   RESOLUTION  of the images while searching and training, in pixels
#
# These values are for small pictures: some 5 minutes on two cores. For photographs:
#   DEVICE=vpu BUDGET=30ms SPACE=quadranet-mobile RESOLUTION=128 examples/own_photos.sh IMAGES
set -eu

PACKAGE=${PACKAGE:-quadranet-nas}
VENV=${VENV:-.venv}
DEVICE=${DEVICE:-cpu}
BUDGET=${BUDGET:-4ms}
SPACE=${SPACE:-quadranet-small}
RESOLUTION=${RESOLUTION:-32}
examples=$(cd "$(dirname "$0")" && pwd)
run=runs/own-photos

# install, and see what this machine has
[ -x "$VENV/bin/qnas" ] || { python3 -m venv "$VENV" && "$VENV/bin/python" -m pip install "$PACKAGE"; }
PATH="$(cd "$VENV/bin" && pwd):$PATH"
qnas doctor

# images, in a folder a class
images=${1:-digits}
[ -d "$images" ] || python "$examples/digits_folder.py" "$images"

# a device: one that is known, or this machine, each block of the space timed on it
if [ "$DEVICE" = here ]; then
    qnas profile --space "$SPACE" --runtime onnxruntime
    DEVICE=devices/local-onnxruntime.json
fi

# a network within the budget, trained by itself, and what was found
qnas search --space "$SPACE" --device "$DEVICE" --budget "$BUDGET" \
    --data "imagefolder:$images" --resolution "$RESOLUTION" --out "$run"
qnas explain "$run"
qnas train-subnet "$run" --resolution "$RESOLUTION"

# as a file, compared with the network on real images; what it takes on this machine
qnas export "$run"
qnas measure "$run"
echo "page        $run/report.html"

# the file at work, without qnas: one of the images
image=$(find "$images" -type f | sort | head -n 1)
python "$examples/classify.py" "$run/export/model.onnx" "$image"
