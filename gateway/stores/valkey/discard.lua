-- Deletes the snapshot and the failure of a task after an invalid value was read.
--
-- KEYS    the task's three keys (common.lua)
-- result  {now}

redis.call('DEL', KEYS[1], KEYS[2])
return {now}
