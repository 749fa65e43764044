#!/bin/sh
# Make the server's certificate and the authority that signs it. Run this on the server; ca.key and server.key stay there, clients get
# tls/ca.crt. Give every name and number by which clients reach the server:  sh make-certificates.sh fl.example.org 10.0.0.5
set -eu
umask 077
cd "$(dirname "$0")"
[ $# -gt 0 ] || { echo "usage: sh make-certificates.sh HOST..." >&2; exit 2; }
days=${FEDLORA_DAYS:-365}
case $days in '' | *[!0-9]* | 0*) echo "FEDLORA_DAYS=$days is no number of days" >&2; exit 2 ;; esac
mkdir -p tls
cd tls
[ ! -e server.key ] || { echo "tls/server.key is there already; remove the folder tls to begin anew" >&2; exit 2; }
names="DNS:localhost,IP:127.0.0.1"
for host in "$@"; do
    case $host in
        localhost | 127.0.0.1) ;;
        *[!0-9.:]*) names="$names,DNS:$host" ;;
        *) names="$names,IP:$host" ;;
    esac
done
openssl req -x509 -newkey rsa:3072 -nodes -keyout ca.key -out ca.crt -days "$days" -subj "/CN=fedlora federation" \
    -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" 2>/dev/null
openssl req -newkey rsa:3072 -nodes -keyout server.key -out server.csr -subj "/CN=$1" 2>/dev/null
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names" > server.ext
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out server.crt -days "$days" -extfile server.ext 2>/dev/null
rm -f server.csr server.ext ca.srl
chmod 644 ca.crt server.crt
echo "made tls/ca.crt (for clients) and tls/server.crt for $names, good for $days days"
