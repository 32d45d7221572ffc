package network

import (
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The filter is one table of the bridge family, replaced as a whole in one transaction: at no
// instant is there none.

const (
	tableName  = "redoubt"
	answerTime = 10 * time.Second

	// bufferSize bounds a transaction, and all answers to it, in bytes: the usual one of a socket is too small for the
	// filter of 64 NICs with MaxAddresses each, about 2 MiB.
	bufferSize = 16 << 20
)

var hooks = map[string]*nftables.ChainHook{
	"prerouting": nftables.ChainHookPrerouting, "forward": nftables.ChainHookForward, "input": nftables.ChainHookInput, "output": nftables.ChainHookOutput,
}

func setFilter(chains []Chain) error {
	// The library waits for an answer to each message, and a kernel that refuses a transaction as a
	// whole gives but one.
	c, err := nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetWriteBuffer(bufferSize), c.SetReadBuffer(bufferSize), c.SetReadDeadline(time.Now().Add(answerTime)))
	}))
	if err != nil {
		return err
	}
	_, err = c.ListTablesOfFamily(nftables.TableFamilyBridge)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
		return fmt.Errorf("%w: nftables for bridges", ErrUnsupported)
	}
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyBridge, Name: tableName})
	c.DelTable(t) // the line above makes sure that there is one
	t = c.AddTable(t)
	made := map[string]*nftables.Chain{}
	dropAll := nftables.ChainPolicyDrop
	for _, ch := range chains {
		n := &nftables.Chain{Name: ch.Name, Table: t}
		if ch.Hook != "" {
			n.Type, n.Hooknum, n.Priority, n.Policy = nftables.ChainTypeFilter, hooks[ch.Hook], nftables.ChainPriorityRef(-300), &dropAll
		}
		made[ch.Name] = c.AddChain(n)
	}
	for _, ch := range chains {
		for _, r := range ch.Rules {
			c.AddRule(&nftables.Rule{Table: t, Chain: made[ch.Name], Exprs: r.expressions()})
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	return nil
}

// expressions is the rule in the kernel's terms.
func (r Rule) expressions() (all []expr.Any) {
	for _, m := range r.Matches {
		value := m.Value
		switch m.Header {
		case Interface, OutInterface:
			value = make([]byte, unix.IFNAMSIZ)
			copy(value, m.Value)
			key := expr.MetaKeyIIFNAME
			if m.Header == OutInterface {
				key = expr.MetaKeyOIFNAME
			}
			all = append(all, &expr.Meta{Key: key, Register: 1})
		case Protocol:
			all = append(all, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1})
		default:
			all = append(all, &expr.Payload{DestRegister: 1, Base: payloadBase[m.Header], Offset: m.Offset, Len: uint32(len(value))})
		}
		if m.Mask != nil {
			all = append(all, &expr.Bitwise{
				SourceRegister: 1, DestRegister: 1, Len: uint32(len(value)), Mask: m.Mask, Xor: make([]byte, len(value)),
			})
		}
		op := expr.CmpOpEq
		if m.Not {
			op = expr.CmpOpNeq
		}
		all = append(all, &expr.Cmp{Op: op, Register: 1, Data: value})
	}
	v := &expr.Verdict{Kind: expr.VerdictJump, Chain: r.Verdict}
	switch r.Verdict {
	case accept:
		v = &expr.Verdict{Kind: expr.VerdictAccept}
	case drop:
		v = &expr.Verdict{Kind: expr.VerdictDrop}
	}
	return append(all, v)
}

var payloadBase = map[Header]expr.PayloadBase{
	Ethernet: expr.PayloadBaseLLHeader, Internet: expr.PayloadBaseNetworkHeader, Transport: expr.PayloadBaseTransportHeader,
}
