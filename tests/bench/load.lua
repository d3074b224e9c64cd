-- The requests of wrk, and its result as one line of JSON.
--
-- TASKS empty: the URL unchanged. TASKS=0: a new task for every request.
-- TASKS=N: N tasks in turn. A path is the URL with a number appended.

local tasks = tonumber(os.getenv("TASKS") or "")
local turn = 0

-- Defined only if tasks differ: without a request function, wrk repeats one prepared request.
if tasks == 0 then
  function request()
    turn = turn + 1
    return wrk.format(nil, wrk.path .. turn)
  end
elseif tasks then
  local ready = {}

  function init()
    for number = 1, tasks do
      ready[number] = wrk.format(nil, wrk.path .. number)
    end
  end

  function request()
    turn = turn % tasks + 1
    return ready[turn]
  end
end

function done(summary)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.timeout + errors.status
  io.write(string.format('\n{"requests": %d, "failed": %d, "seconds": %.6f}\n',
    summary.requests, failed, summary.duration / 1e6))
end
