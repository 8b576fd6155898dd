-- Publishes, and keeps what it publishes for nodes that can't hear it now.
--
-- KEYS[1]  stream what was published, oldest first: pub/sub channel -> body
-- ARGV[1]  about how many entries are kept
-- ARGV[2]  how long the stream outlives its last entry, in milliseconds
-- ARGV[3…] two each: pub/sub channel, body
--
-- A publication carries the id of its entry where others carry the excluded socket id, which has no
-- dash. One step, so whoever hears an id has heard, or missed for good, all with lower ones.
-- A Redis that can't keep anything (no memory, no disk) still carries it, without an id. A replica
-- must not: nobody else would hear it.
--
-- Returns how many were kept.

local kept = 0
for i = 3, #ARGV, 2 do
  local id = redis.pcall('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', ARGV[i], ARGV[i + 1])
  if type(id) == 'table' then
    if string.find(id.err, 'READONLY') or string.find(id.err, 'MASTERDOWN') then
      return id
    end
    id = ''
  else
    kept = kept + 1
  end
  redis.call('PUBLISH', ARGV[i], string.char(1, #id) .. id .. ARGV[i + 1])
end
if kept > 0 then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return kept
