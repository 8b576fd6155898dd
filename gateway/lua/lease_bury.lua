-- Forgets a dead node when none of its entries is left.
--
-- KEYS[1]   zset   node -> end of its lease, in milliseconds of Redis' clock
-- KEYS[2]   hash   node -> 1, the nodes whose entries stand
-- KEYS[3…]  the node's entries, one key for each tenant of the lease
-- ARGV[1]   the node
--
-- Returns 1 when it is forgotten, 0 when it is alive or still has entries.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = redis.call('ZSCORE', KEYS[1], ARGV[1])
if lease and tonumber(lease) > now then
  return 0
end
for index = 3, #KEYS do
  if redis.call('EXISTS', KEYS[index]) == 1 then
    return 0
  end
end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
return 1
