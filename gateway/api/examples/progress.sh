#!/bin/sh
# Wait until a task has ended, by long polls, and print its final progress:
#
#     sh progress.sh http://127.0.0.1:8080/v1/progress/TASK [SECONDS [UNKNOWN]]
#
# The exit status is 0 if the task has succeeded. It is 1 if the task has failed, was canceled or is unknown, or if the
# gateway refuses the request. It is 2 without a URL, and 124 if the task has not ended within SECONDS (1200). A new
# task is unknown to the vendor for a moment: it may be rejected for UNKNOWN seconds (30).

if [ -z "${1:-}" ]; then
    printf '%s\n' "usage: sh progress.sh URL [SECONDS [UNKNOWN]]" >&2
    exit 2
fi
seconds=${2:-1200}
unknown=${3:-30}
deadline=$(($(date +%s) + seconds))
known_by=$(($(date +%s) + unknown))
backoff=1
while left=$((deadline - $(date +%s))) && [ "$left" -gt 0 ]; do
    response=$(curl --silent --show-error --include --suppress-connect-headers --write-out '\n%{http_code}' \
        --max-time "$((left < 75 ? left : 75))" --get --data "wait=$((left < 60 ? left : 60))" "$1") || response=000
    status=$(printf '%s\n' "$response" | tail -n 1)
    body=$(printf '%s\n' "$response" | grep '^{')
    pause=1
    case $status in
        200)
            backoff=1
            known_by=$(($(date +%s) + unknown))
            case ${body%%,\"state\":*} in # without the vendor's object, which may have members of the same names
                *'"status":"succeeded"'*) printf '%s\n' "$body" && exit 0 ;;
                *'"terminal":true'*) printf '%s\n' "$body" && exit 1 ;;
            esac
            ;;
        000 | 429 | 5??)
            backoff=$((backoff < 16 ? backoff * 2 : 30))
            pause=$backoff
            case $body in
                *'"code":"upstream-rejected"'*) # a long poll waits for a new task, but may end early
                    rest=$((known_by - $(date +%s)))
                    [ "$rest" -gt 0 ] || break
                    pause=$((backoff < rest ? backoff : rest))
                    ;;
            esac
            retry_after=$(printf '%s\n' "$response" | sed -n 's/^[Rr]etry-[Aa]fter: *0*\([1-9][0-9]\{0,5\}\).*/\1/p')
            pause=$((pause > ${retry_after:-0} ? pause : ${retry_after:-0}))
            ;;
        *) break ;;
    esac
    left=$((deadline - $(date +%s)))
    [ "$pause" -lt "$left" ] || pause=$((left > 0 ? left : 0))
    sleep "$pause"
done
printf '%s\n' "$1: HTTP status $status $body" >&2
[ "$left" -gt 0 ] && exit 1
printf '%s\n' "$1: not ended after $seconds seconds" >&2
exit 124
