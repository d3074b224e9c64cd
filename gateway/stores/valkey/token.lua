-- Takes a permit from the shared rate limiter: a generic cell rate algorithm (GCRA). The caller waits for it.
--
-- KEYS    1 the moment from which on the next permit is available
-- ARGV    in microseconds: 1 interval between two permits, 2 intervals that may be saved up, 3 maximum wait
-- result  {now, 1 if a permit was taken or 0, microseconds until it is available}

local interval, burst, max_wait = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local free = redis.pcall('GET', KEYS[1])
free = type(free) == 'string' and tonumber(free) or 0
-- If the clock was set back, a moment in the far future must not block every replica.
if free < now or free > now + 3600000000 then free = now end
local wait = math.max(free - burst - now, 0)
if wait > max_wait then return {now, 0, wait} end
local next_free = free + interval
local left = math.ceil((next_free - now) / 1000)
redis.call('SET', KEYS[1], string.format('%.0f', next_free), 'PX', left)
return {now, 1, wait}
