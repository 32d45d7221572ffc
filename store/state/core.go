package state

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"redoubt.dev/redoubt/store/logic"
	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/store/wire"
)

// Limits of one guest, over all its connections; those of the C daemon.
const (
	maxWatches      = 128
	maxTransactions = 10
	// maxAge is the number of commits after which a transaction still open loses its view of
	// the contents (tree.Tx.Renew): it bounds what such views can cost.
	maxAge = 1 << 14
)

// core carries out what requests mean: the contents, all watches, all open transactions. It
// does no I/O but through persist, knows no clock and has no locks: State gives it one owner.
type core struct {
	tree     *tree.Tree
	persist  tree.Persist
	log      *slog.Logger
	emit     func(*session, wire.Message) // to a client, without waiting
	hangUp   func(*session)
	sessions map[*session]bool
	watches  map[string][]*watch // by watched path
	domains  map[tree.Domain]*usage
	commits  uint64
}

// usage is what a domain's connections hold together.
type usage struct{ sessions, watches, transactions int }

// session is one connection.
type session struct {
	domain  tree.Domain
	use     *usage
	watches []*watch
	txs     map[uint32]*transaction
	lastTx  uint32
}

type transaction struct {
	*tree.Tx
	began uint64 // core.commits then
}

type watch struct {
	s           *session
	path, token string
	shown       string // the path as the client wrote it
}

func newCore(log *slog.Logger, t *tree.Tree, persist tree.Persist) *core {
	return &core{
		tree: t, persist: persist, log: log, sessions: map[*session]bool{},
		watches: map[string][]*watch{}, domains: map[tree.Domain]*usage{},
	}
}

// open begins a session. A guest's first is its introduction: @introduceDomain.
func (c *core) open(d tree.Domain) *session {
	u := c.domains[d]
	if u == nil {
		u = &usage{}
		c.domains[d] = u
	}
	u.sessions++
	s := &session{domain: d, use: u, txs: map[uint32]*transaction{}}
	c.sessions[s] = true
	if u.sessions == 1 && d >= tree.FirstGuest && !c.tree.Domain(d).Introduced {
		c.fireSpecial(tree.IntroduceDomain)
	}
	return s
}

// close ends a session and all it held. A guest's last is its release: @releaseDomain.
func (c *core) close(s *session) {
	if !c.sessions[s] {
		return
	}
	delete(c.sessions, s)
	c.reset(s)
	if s.use.sessions--; s.use.sessions > 0 {
		return
	}
	delete(c.domains, s.domain)
	if s.domain >= tree.FirstGuest && !c.tree.Domain(s.domain).Introduced {
		c.fireSpecial(tree.ReleaseDomain)
	}
}

// reset drops a session's watches and transactions.
func (c *core) reset(s *session) {
	for len(s.watches) > 0 {
		c.unwatch(s.watches[len(s.watches)-1])
	}
	s.use.transactions -= len(s.txs)
	clear(s.txs)
}

var ok = wire.Join("OK")

// handle carries out the action that a session's request stands for: the reply goes out, then
// the events it causes. Of m only the header counts.
func (c *core) handle(s *session, m wire.Message, a logic.Action) {
	var then effects
	payload, err := c.perform(s, m, a, &then)
	if err != nil {
		c.refuse(s, m, err)
		return
	}
	c.emit(s, wire.Message{Type: m.Type, Request: m.Request, Tx: m.Tx, Payload: payload})
	switch {
	case then.commit != nil:
		c.fire(then.commit)
	case then.watch != nil:
		c.emit(s, then.watch.event(then.watch.path))
	case then.special != "":
		c.fireSpecial(then.special)
	}
	if then.release {
		for o := range c.sessions {
			if o.domain == a.Domain {
				c.hangUp(o)
			}
		}
	}
}

// effects are what follows a reply.
type effects struct {
	commit  *tree.Effects
	watch   *watch
	special string
	release bool
}

func (c *core) refuse(s *session, m wire.Message, err error) {
	var e tree.Errno
	if !errors.As(err, &e) {
		c.log.Error("store request failed", "domain", s.domain, "type", m.Type, "err", err)
		e = tree.EIO
	}
	c.emit(s, wire.Message{Type: wire.Error, Request: m.Request, Tx: m.Tx, Payload: wire.Join(string(e))})
}

func (c *core) perform(s *session, m wire.Message, a logic.Action, then *effects) ([]byte, error) {
	if a.Errno != "" {
		return nil, a.Errno
	}
	switch m.Type {
	case wire.Read, wire.Directory, wire.DirectoryPart, wire.GetPerms, wire.Write, wire.Mkdir, wire.Remove, wire.SetPerms:
		if strings.HasPrefix(a.Path, "@") {
			return c.specialPerms(s, m, a)
		}
		x := c.tree.Direct(s.domain)
		if m.Tx != 0 {
			t := s.txs[m.Tx]
			if t == nil {
				return nil, tree.ENOENT
			}
			return node(t.Tx, m.Type, a)
		}
		payload, err := node(x, m.Type, a)
		if err == nil && x.Changed() {
			then.commit, err = c.commit(x)
		}
		return payload, err
	case wire.TransactionStart, wire.TransactionEnd:
		return c.transaction(s, m, a, then)
	case wire.Watch:
		w, err := c.watch(s, a)
		then.watch = w
		return ok, err
	case wire.Unwatch:
		for _, w := range s.watches {
			if w.path == a.Path && w.token == a.Token {
				c.unwatch(w)
				return ok, nil
			}
		}
		return nil, tree.ENOENT
	case wire.ResetWatches:
		c.reset(s)
		return ok, nil
	default:
		return c.manage(s, m.Type, a, then)
	}
}

// node performs an operation on one node.
func node(x *tree.Tx, t wire.Type, a logic.Action) ([]byte, error) {
	switch t {
	case wire.Read:
		return x.Read(a.Path)
	case wire.Directory:
		names, _, err := x.List(a.Path)
		return fit(wire.Join(names...), err)
	case wire.DirectoryPart:
		names, gen, err := x.List(a.Path)
		if err != nil {
			return nil, err
		}
		return part(names, gen, a.Offset), nil
	case wire.GetPerms:
		perms, err := x.Perms(a.Path)
		return fit(permStrings(perms), err)
	case wire.Write:
		return ok, x.Write(a.Path, a.Value)
	case wire.Mkdir:
		return ok, x.Mkdir(a.Path)
	case wire.Remove:
		return ok, x.Remove(a.Path)
	default:
		return ok, x.SetPerms(a.Path, a.Perms)
	}
}

func permStrings(perms []tree.Perm) []byte {
	var b []byte
	for _, p := range perms {
		b = append(append(b, p.String()...), 0)
	}
	return b
}

func fit(b []byte, err error) ([]byte, error) {
	if err == nil && len(b) > wire.MaxPayload {
		return nil, tree.E2BIG
	}
	return b, err
}

// part is DIRECTORY_PART's answer: the generation, then whole names from offset on, as many as
// fit, then an empty one if these are the last.
func part(names []string, gen uint64, offset uint32) []byte {
	b := fmt.Appendf(nil, "%d\x00", gen)
	all := wire.Join(names...)
	if uint64(offset) >= uint64(len(all)) {
		return append(b, 0)
	}
	rest := all[offset:]
	if room := wire.MaxPayload - len(b) - 1; len(rest) > room {
		return append(b, rest[:strings.LastIndexByte(string(rest[:room]), 0)+1]...)
	}
	return append(append(b, rest...), 0)
}

func (c *core) specialPerms(s *session, m wire.Message, a logic.Action) ([]byte, error) {
	if m.Type == wire.GetPerms {
		perms, err := c.tree.SpecialPerms(a.Path)
		return fit(permStrings(perms), err)
	}
	if m.Tx != 0 { // these are no nodes, and not a transaction's to change
		return nil, tree.EINVAL
	}
	return ok, c.tree.SetSpecialPerms(s.domain, a.Path, a.Perms, c.persist)
}

func (c *core) commit(x *tree.Tx) (*tree.Effects, error) {
	e, err := x.Commit(c.persist)
	if err != nil {
		return nil, err
	}
	c.committed()
	return e, nil
}

// committed counts a commit and takes the views of transactions that are open for too many.
func (c *core) committed() {
	c.commits++
	if c.commits%(maxAge/8) == 0 {
		for s := range c.sessions {
			for _, t := range s.txs {
				if c.commits-t.began >= maxAge {
					t.Renew()
					t.began = c.commits
				}
			}
		}
	}
}

func (c *core) transaction(s *session, m wire.Message, a logic.Action, then *effects) ([]byte, error) {
	if m.Type == wire.TransactionStart {
		switch {
		case m.Tx != 0:
			return nil, tree.EBUSY
		case s.domain >= tree.FirstGuest && s.use.transactions >= maxTransactions:
			return nil, tree.ENOSPC
		}
		for s.lastTx++; s.lastTx == 0 || s.txs[s.lastTx] != nil; s.lastTx++ {
		}
		s.use.transactions++
		s.txs[s.lastTx] = &transaction{Tx: c.tree.Begin(s.domain), began: c.commits}
		return fmt.Appendf(nil, "%d\x00", s.lastTx), nil
	}
	t := s.txs[m.Tx]
	if t == nil {
		return nil, tree.ENOENT
	}
	delete(s.txs, m.Tx)
	s.use.transactions--
	if !a.Commit {
		return ok, nil
	}
	var err error
	then.commit, err = c.commit(t.Tx)
	return ok, err
}

// manage performs what concerns domains ("Domain management and xenstored communications").
// On a socket INTRODUCE has no ring to map: it says that the domain is there, as a connection
// with its identity does.
func (c *core) manage(s *session, t wire.Type, a logic.Action, then *effects) ([]byte, error) {
	switch t {
	case wire.GetDomainPath:
		return wire.Join(tree.Home(a.Domain)), nil
	case wire.IsDomainIntroduced:
		if a.Domain == tree.Privileged || c.introduced(a.Domain) {
			return wire.Join("T"), nil
		}
		return wire.Join("F"), nil
	}
	if s.domain != tree.Privileged {
		return nil, tree.EACCES
	}
	attr := c.tree.Domain(a.Domain)
	switch t {
	case wire.Introduce:
		if a.Domain == tree.Privileged {
			return nil, tree.EINVAL
		}
		attr.Introduced = true
		then.special = tree.IntroduceDomain
	case wire.Release:
		if a.Domain == tree.Privileged {
			return nil, tree.EINVAL
		}
		if !c.introduced(a.Domain) {
			return nil, tree.ENOENT
		}
		if attr.Introduced {
			then.special = tree.ReleaseDomain // else the last connection's end tells it
		}
		then.release = a.Domain >= tree.FirstGuest
		attr = tree.Attributes{}
	case wire.Resume:
		if !c.introduced(a.Domain) {
			return nil, tree.ENOENT
		}
		return ok, nil
	case wire.SetTarget:
		if a.Domain == tree.Privileged || a.Target == tree.Privileged {
			return nil, tree.EINVAL
		}
		attr.Target = a.Target
	default:
		return c.control(a.Words)
	}
	return ok, c.tree.SetDomain(a.Domain, attr, c.persist)
}

func (c *core) introduced(d tree.Domain) bool {
	u := c.domains[d]
	return c.tree.Domain(d).Introduced || (d >= tree.FirstGuest && u != nil && u.sessions > 0)
}

// control performs CONTROL, whose commands are each implementation's own.
func (c *core) control(words []string) ([]byte, error) {
	switch words[0] {
	case "help":
		return wire.Join("help: this list; check: counts everything anew; quota: the limits of a guest"), nil
	case "check":
		if err := c.tree.Verify(); err != nil {
			return nil, fmt.Errorf("check: %w", err)
		}
		return ok, nil
	case "quota":
		return wire.Join(fmt.Sprintf("nodes %d, watches %d, transactions %d, bytes of a value %d, permissions of a node %d, outstanding requests %d",
			tree.MaxNodes, maxWatches, maxTransactions, tree.MaxNodeSize, tree.MaxPerms, maxOutstanding)), nil
	}
	return nil, tree.EINVAL
}
