package toolstack

import (
	"net"
	"net/http"
	"sync"
)

// How many connections the API has at a time: each costs a descriptor. Root has what there is.
const (
	maxConnections = 64 // of one user
	// maxStrangers is for all together who have no part in the tenant: one user may have 65536 more (subuid(5)).
	maxStrangers = 128
)

// crowd counts users' connections. It is http.Server's ConnState.
type crowd struct {
	knows func(uid uint32) bool // that the user has a part in the tenant

	mu        sync.Mutex
	of        map[net.Conn]uint32
	many      map[uint32]int
	strangers int
}

func newCrowd(knows func(uid uint32) bool) *crowd {
	return &crowd{knows: knows, of: map[net.Conn]uint32{}, many: map[uint32]int{}}
}

func (c *crowd) state(conn net.Conn, s http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch s {
	case http.StateNew:
		uid := credentials(conn).UID
		c.of[conn] = uid
		c.many[uid]++
		stranger := !c.knows(uid)
		if stranger {
			c.strangers++
		}
		if uid != 0 && (c.many[uid] > maxConnections || stranger && c.strangers > maxStrangers) {
			conn.Close() // the server finds it closed, and says so here
		}
	case http.StateClosed, http.StateHijacked:
		uid, ok := c.of[conn]
		if !ok {
			return
		}
		delete(c.of, conn)
		if c.many[uid]--; c.many[uid] == 0 {
			delete(c.many, uid)
		}
		if !c.knows(uid) {
			c.strangers--
		}
	}
}
