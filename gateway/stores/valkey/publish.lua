-- Publishes a message.
--
-- KEYS    1 a key that is never set: it routes the script to the channel's server
-- ARGV    1 publish command, 2 channel, 3 message
-- result  {now}

redis.call(ARGV[1], ARGV[2], ARGV[3])
return {now}
