#!/bin/sh
# Make a client's key. Run this on the client's machine; the private key stays there, the operator of the server gets keys/NAME.pub:
#   sh make-key.sh NAME
set -eu
umask 077
cd "$(dirname "$0")"
[ $# -eq 1 ] || { echo "usage: sh make-key.sh NAME" >&2; exit 2; }
mkdir -p keys
[ ! -e "keys/$1" ] || { echo "keys/$1 is there already; remove it to begin anew" >&2; exit 2; }
ssh-keygen -q -t ecdsa -b 384 -N "" -C "$1" -f "keys/$1"
echo "made keys/$1 (stays here) and keys/$1.pub (for the operator of the server)"
