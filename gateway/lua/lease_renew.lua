-- Renews a node's lease and tells what has happened meanwhile.
--
-- KEYS[1]  zset   node -> end of its lease, in milliseconds of Redis' clock
-- KEYS[2]  string the epoch: chosen when the data begins, gone when the data is
-- KEYS[3]  hash   node -> 1, the nodes whose entries stand
-- ARGV[1]  the node
-- ARGV[2]  the lease's length in milliseconds
-- ARGV[3]  an epoch to use if there is none
--
-- Returns {epoch, 1 if the node's lease still stood, else 0, nodes whose lease has run out,
-- nodes whose entries stand}.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local lease = redis.call('ZSCORE', KEYS[1], ARGV[1])
local stood = 0
if lease and tonumber(lease) > now then
  stood = 1
end

-- A Redis that is full refuses what may take memory, but not to a script that has written before;
-- this changes nothing. So no node loses its lease to one that asked when there was a little room.
redis.call('ZREM', KEYS[1], '')

local epoch = redis.call('GET', KEYS[2])
if not epoch then
  epoch = ARGV[3]
  redis.call('SET', KEYS[2], epoch)
end
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])

return {
  epoch,
  stood,
  redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now),
  redis.call('HKEYS', KEYS[3]),
}
