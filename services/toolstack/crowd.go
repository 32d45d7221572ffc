package toolstack

import (
	"net"
	"net/http"
	"sync"
)

// maxConnections is how many connections of one user the API has at a time: each costs a descriptor, whether the user has any part
// in the tenant or not. Root has what there is.
const maxConnections = 64

// crowd counts users' connections. It is http.Server's ConnState.
type crowd struct {
	mu   sync.Mutex
	of   map[net.Conn]uint32
	many map[uint32]int
}

func newCrowd() *crowd { return &crowd{of: map[net.Conn]uint32{}, many: map[uint32]int{}} }

func (c *crowd) state(conn net.Conn, s http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch s {
	case http.StateNew:
		uid := credentials(conn).UID
		c.of[conn] = uid
		c.many[uid]++
		if uid != 0 && c.many[uid] > maxConnections {
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
	}
}
