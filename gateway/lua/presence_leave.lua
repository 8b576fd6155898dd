-- Removes one entry (node, socket) of a user, and announces the end of the user's last.
--
-- KEYS[1]  hash   user id -> user_info (JSON): the channel's members
-- KEYS[2]  hash   user id -> number of entries
-- KEYS[3]  set    the entries of the node that the entry belongs to
-- KEYS[4]  zset   node -> end of its lease, in milliseconds of Redis' clock
-- KEYS[5]  string the epoch
-- ARGV[1]  the entry, "app channel socket user"
-- ARGV[2]  user id
-- ARGV[3]  pub/sub channel for the announcement
-- ARGV[4]  the announcement
-- ARGV[5]  the node whose lease must have run out, when a survivor removes its entries; else empty
-- ARGV[6]  the epoch that the node knows; empty: any
-- ARGV[7]  hook, see webhook_facts.lua
-- ARGV[8]  fact
--
-- Returns 1 when the user is no member any more, 0 when it still is or the entry was gone already,
-- -1 when the node is alive after all, -2 when the epoch is another one.

if ARGV[6] ~= '' and redis.call('GET', KEYS[5]) ~= ARGV[6] then
  return -2
end

if ARGV[5] ~= '' then
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local lease = redis.call('ZSCORE', KEYS[4], ARGV[5])
  if lease and tonumber(lease) > now then
    return -1
  end
end

if redis.call('SREM', KEYS[3], ARGV[1]) == 0 then
  return 0
end
if redis.call('HINCRBY', KEYS[2], ARGV[2], -1) > 0 then
  return 0
end
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('HDEL', KEYS[1], ARGV[2])
redis.call('PUBLISH', ARGV[3], ARGV[4])
hook_left(ARGV[7], ARGV[8])
return 1
